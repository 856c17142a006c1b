"""Recipe texts that the tests of this folder start from."""

from __future__ import annotations

from pathlib import Path

MINIMAL = """\
name = "demo"

[model]
preset = "tiny-moe"

[tokenizer]
kind = "char"

[[stage]]
kind = "pretrain"
name = "base"
steps = 5
optimizer.lr = 1e-3
[[stage.corpus]]
styles = { steps = 1.0 }

[[stage]]
kind = "grpo"
name = "r1.zero"
steps = 16
optimizer.lr = 3e-6
[stage.prompts]
source = "generator"
task = "chain_sum"
[[stage.reward]]
kind = "accuracy"
[[stage.reward]]
kind = "format"

[[stage]]
kind = "eval"
name = "final"
[stage.prompts]
source = "generator"
task = "chain_sum"
"""


def write(folder: Path, text: str = MINIMAL, name: str = "recipe.toml") -> Path:
    """The text as a file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
