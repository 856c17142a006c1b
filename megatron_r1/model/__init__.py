"""From a Hugging Face style config.json to a Megatron-Core GPT model, on a CPU or a GPU."""
