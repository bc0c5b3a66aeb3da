"""Measurements that docs/measurements.md quotes, each with its command."""
