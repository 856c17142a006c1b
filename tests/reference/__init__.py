"""Slow twins of the fast paths, in plain torch and Python."""
