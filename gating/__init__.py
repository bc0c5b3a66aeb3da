"""Training of networks with switches: the supervised and the reinforcement objective, one epoch of each."""
