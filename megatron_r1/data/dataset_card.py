"""The card of a data set that a stage wrote: README.md for people and for the Hugging Face hub, card.json for programs.

Last in the flow of `sample`, `preferences` and `mix` stages. A card holds neither times nor places of this machine, so
that the same data give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from pydantic import BaseModel

Cell = str | int | float | None

DATA_FILE = "data.jsonl"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGEST = "n>1M"
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Per cent, of `quantiles`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardTable:
    """One table of a card. Example: CardTable(title="Dropped", columns=["reason", "rows"], rows=[["wrong", 12]])."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""  # under the title


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card says."""

    name: str  # "<run>/<stage>"
    what: str  # a sentence or more: what the rows are and how they were made
    rows: int  # of data.jsonl
    columns: dict[str, str]  # column -> its meaning
    tables: list[CardTable]
    settings: dict[str, Any]  # the stage's settings, nested as in the recipe
    facts: dict[str, Any]  # what card.json holds besides
    languages: list[str] = field(default_factory=list)  # codes that occur


def card_files(card: Card) -> dict[str, str]:
    """File name -> its text: README.md with the hub's YAML header, and card.json."""
    facts = {"name": card.name, "rows": card.rows, **card.facts, "settings": card.settings}
    return {"README.md": _readme(card), "card.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n"}


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """{"mean", "0%", "5%", ..., "100%"} of some lengths, each but the mean one of them (nearest rank); {} of none."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    last = len(ordered) - 1
    found = {f"{share}%": float(ordered[(share * last + 50) // 100]) for share in QUANTILES}
    return {"mean": round(sum(ordered) / len(ordered), 1), **found}


def shown_settings(stage: BaseModel) -> dict[str, Any]:
    """A stage's settings for its card: as in the recipe, without places (addresses, folders) and keys of servers."""
    shown: dict[str, Any] = _without_places(stage.model_dump(by_alias=True, exclude_none=True))
    return shown


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_places(item, name) for name, item in value.items() if name not in ("url", "api_key")}
    if isinstance(value, list | tuple):
        return [_without_places(item, key) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and key in ("call", "from")):
        return str(value).rpartition("/")[2]
    return value


def _readme(card: Card) -> str:
    header = DatasetCardData(
        language=sorted(card.languages) or None,
        pretty_name=card.name,
        size_categories=[next((name for bound, name in _SIZES if card.rows < bound), _LARGEST)],
        task_categories=["text-generation"],
        tags=["synthetic", "megatron-r1"],
        configs=[{"config_name": "default", "data_files": DATA_FILE}],
    ).to_yaml()
    parts = [f"---\n{header.strip()}\n---\n", f"# {card.name}\n", f"{card.what}\n", f"Rows: {card.rows}\n"]
    parts.append(_table("Columns", ["column", "meaning"], [[f"`{name}`", text] for name, text in card.columns.items()]))
    for table in card.tables:
        parts.append(_table(table.title, table.columns, table.rows, table.note))
    parts.append(_table("Settings", ["key", "value"], [[f"`{key}`", value] for key, value in _flat(card.settings)]))
    return "\n".join(parts)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> str:
    lines = [f"## {title}\n"]
    if note:
        lines.append(f"{note}\n")
    lines += [_line(columns), _line(["---"] * len(columns)), *(_line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Cell]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}" if cell != int(cell) else f"{cell:.0f}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Cell]]:
    """("filter.language", 0.95), ...; lists of tables by number."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                yield from _flat(item, f"{before}{key}.{number}.")
        elif value is not None:
            yield f"{before}{key}", value if isinstance(value, str | int | float) else json.dumps(value, default=str)
