"""Stages that make data: sampling in chunks, selection, judges, mixes."""
