"""Stages that look at weights or hand them on: evaluation, export; the reward-model server."""
