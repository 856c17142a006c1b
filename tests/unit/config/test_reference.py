"""The key reference says what the schema says, and docs/configuration.md is that text."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.load import describe

DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_types_defaults_and_meanings() -> None:
    text = describe()
    assert "- `clip_low`: number > 0; default: 10.0\n  Lower clip 1 - clip_low." in text
    assert '- `precision`: "fp32" or "bf16" or "fp8-blockwise" or "fp8-emulated"; default: "fp32"' in text
    assert "- `from`: string; default: not set" in text
    assert "- `group_size`: integer >= 2; default: 16" in text
    assert "- `top_p`: number > 0, <= 1; default: 1.0" in text
    assert text.count("- `temperature`: number > 0; default: 0.6") == 2  # of benchmarks and evaluations
    assert '## `[[stage]]`, kind = "eval"' in text
    assert text.count("## `[[stage.prompts]]`") == 1  # shared by four kinds of stage, described once
    assert "init_from" not in text


def test_the_document_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == describe(), "run: make docs"
