"""Switches: REINFORCE, steering, operating point, fixing, routing pictures."""
