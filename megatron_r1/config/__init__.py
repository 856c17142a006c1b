"""Typed configuration: TOML in, validated pydantic models out. Imports neither torch nor Megatron."""
