"""Benches of the decisions: how long a tick takes, and where the autoscaler's table comes from."""
