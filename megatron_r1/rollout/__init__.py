"""Sampling: the RolloutEngine protocol and its engines."""
