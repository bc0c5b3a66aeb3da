"""Run folders, keeping and resuming, checkpoints, predecessors, records, the results table and its picture."""
