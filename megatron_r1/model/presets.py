"""Architectures as Hugging Face config.json dictionaries: shipped presets, a user's file, overrides. No torch."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig

FAMILIES = ("deepseek_v3", "qwen2", "qwen3", "llama")
Architecture = dict[str, Any]
"""The content of a config.json."""


def preset_names() -> list[str]:
    """Names of the shipped architectures."""
    folder = resources.files("megatron_r1.model") / "presets"
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def architecture(model: ModelConfig, tokenizer_vocab: int) -> Architecture:
    """The config.json dictionary of a run, with overrides applied and the vocabulary fixed.

    Presets with `vocab_size` null take the tokenizer's size. Raises UserError for an unknown preset, an unreadable
    file, an unknown key, an unsupported family, or a tokenizer larger than the model's vocabulary.
    """
    config = _shipped(model.preset) if model.preset is not None else _from_file(Path(str(model.config)))
    for key, value in model.override.items():
        if key not in config:
            close = difflib.get_close_matches(key, config, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(sorted(config))}"
            raise UserError(f"model.override.{key}: {config['model_type']} architectures have no such key{hint}")
        config[key] = value
    if config.get("vocab_size") is None:
        config["vocab_size"] = tokenizer_vocab
    if tokenizer_vocab > config["vocab_size"]:
        raise UserError(
            f"the tokenizer has {tokenizer_vocab} tokens but the model's vocab_size is {config['vocab_size']}: "
            "ids beyond it have no embedding. Use the model's own tokenizer, or set model.override.vocab_size"
        )
    return config


def _shipped(name: str) -> Architecture:
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"model.preset: there is no {name!r}; {hint}shipped presets: {', '.join(preset_names())}")
    text = (resources.files("megatron_r1.model") / "presets" / f"{name}.json").read_text()
    return dict(json.loads(text))


def _from_file(path: Path) -> Architecture:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"model.config: there is no file {file}; give a Hugging Face config.json or its folder"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"model.config: {file} is not readable JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") not in FAMILIES:
        given = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"model.config: {file} has model_type {given!r}; supported: {', '.join(FAMILIES)}")
    return config
