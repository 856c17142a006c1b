"""Tokenizers, templates, prompt sources, pre-training text and micro-batches."""
