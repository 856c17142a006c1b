"""megatron_r1: the DeepSeek-R1 recipe on Megatron-Core. Imports nothing heavy; only the version lives here."""

__version__ = "0.1.0"
