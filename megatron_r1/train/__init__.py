"""The loops, each on one screen, and the optimizer step and no-grad passes they share."""
