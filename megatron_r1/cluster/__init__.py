"""Where ranks run: on this machine (`local.py`) or under Slurm."""
