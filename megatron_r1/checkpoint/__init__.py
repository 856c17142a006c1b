"""Save, load and retain checkpoints through Megatron's dist_checkpointing."""
