"""Data, checkpoints, run folders, costs, settings and results: what all three stages share."""
