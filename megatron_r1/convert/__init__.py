"""Hugging Face <-> Megatron checkpoints: tables that run both ways, a planner of byte ranges, a streaming executor."""
