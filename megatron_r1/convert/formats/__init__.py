"""Checkpoint formats as they lie on disk: Hugging Face folders, torch_dist, legacy; read into `storage.Archive`."""
