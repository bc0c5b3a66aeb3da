"""Measurements that the README quotes, each with its command."""
