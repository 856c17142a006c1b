"""Processes and their groups: the layout, the CPU backend, zig-zag positions of context parallelism."""
