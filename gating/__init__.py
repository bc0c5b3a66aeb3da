"""Switches: REINFORCE, steering, operating point, fixing, routing pictures; and the search for a cascade."""
