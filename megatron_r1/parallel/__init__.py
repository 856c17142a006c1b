"""Processes and their groups: the layout, the CPU backend, vocabulary-parallel log-probs."""
