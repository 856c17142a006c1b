"""What the reports of `sample` and `preferences` stages have in common: counts, who judged, tables, a refusal.

A stage counts prompt by prompt; the summary of a chunk holds the counts by domain, under "domains", and the prompts
that were left out, under "held_out".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.judges import JudgeConfig, RewriteConfig
from megatron_r1.data.dataset_card import CardTable, Cell


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of prompts. Example: Counts(prompts=2, prompts_kept=1, samples=8, rows=1, dropped={"wrong": 7})."""

    prompts: int = 0
    prompts_kept: int = 0  # with a row at least
    samples: int = 0  # what may become a row: an answer, or a pair of them
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> samples; samples - rows in all

    def keep(self) -> None:
        """One more row of this prompt."""
        self.rows += 1
        self.prompts_kept = 1

    def drop(self, reason: str) -> None:
        """One sample is dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def share(self, number: int) -> float:
        """Of all samples."""
        return number / max(self.samples, 1)


def add(parts: Iterable[Counts], reasons: Sequence[str]) -> Counts:
    """The counts of all parts together; `dropped` is in the order of `reasons`."""
    total, dropped = Counts(), Counter[str]()
    for part in parts:
        total.prompts += part.prompts
        total.prompts_kept += part.prompts_kept
        total.samples += part.samples
        total.rows += part.rows
        dropped.update(part.dropped)
    total.dropped = {reason: dropped[reason] for reason in reasons if dropped[reason]}
    return total


def by_name(counted: Iterable[tuple[str, Counts]], reasons: Sequence[str]) -> dict[str, dict[str, Any]]:
    """(name, counts of a prompt) -> for a summary: the counts together of each name, in alphabetical order."""
    parts: dict[str, list[Counts]] = {}
    for name, counts in counted:
        parts.setdefault(name, []).append(counts)
    return {name: asdict(add(found, reasons)) for name, found in sorted(parts.items())}


def counts_by(summaries: Sequence[Mapping[str, Any]], key: str, reasons: Sequence[str]) -> dict[str, Counts]:
    """The counts of some chunks by what `key` of their summaries names: "domains", "sources"."""
    names = sorted({name for summary in summaries for name in summary[key]})
    return {name: add((Counts(**s[key][name]) for s in summaries if name in s[key]), reasons) for name in names}


def totals(summaries: Sequence[Mapping[str, Any]], reasons: Sequence[str]) -> Counts:
    """The counts of some chunks."""
    return add(counts_by(summaries, "domains", reasons).values(), reasons)


def held_out(summaries: Sequence[Mapping[str, Any]]) -> int:
    """Prompts of some chunks that were not asked, as an evaluation asks them."""
    return sum(summary["held_out"] for summary in summaries)


def held_out_note(number: int) -> str:
    """A sentence for the card's first paragraph; "" for none."""
    return f" {number} prompts were not asked, as an evaluation asks them." if number else ""


def dropped_table(title: str, column: str, total: Counts, note: str) -> CardTable:
    """Reasons, how many were dropped for each, and the rest. column: what is counted."""
    rows: list[list[Cell]] = [[why, count, total.share(count)] for why, count in total.dropped.items()]
    kept: list[Cell] = ["kept", total.rows, total.share(total.rows)]
    return CardTable(title=title, columns=["reason", column, "share"], rows=[*rows, kept], note=note)


def name_of(hook: JudgeConfig | RewriteConfig | None) -> str | None:
    """A judge or rewriter: the model of its server, or the function."""
    if hook is None:
        return None
    return str(hook.server.model) if hook.server is not None else str(hook.call).rpartition("/")[2]


def name_of_weights(start: Path, run: Path) -> str:
    """Relative to the run, e.g. "rl1/checkpoints/step-00000600"; of weights elsewhere their folder's name."""
    return start.relative_to(run).as_posix() if start.is_relative_to(run) else start.name


def kept_none(stage: str, things: str, total: Counts, folder: Path, cure: str) -> UserError:
    """What a stage raises that has no row. things: what it counts, e.g. "samples"."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in total.dropped.items()) or "no prompt was asked"
    return UserError(
        f"stage {stage!r} kept none of {total.samples} {things} ({reasons}); {folder / 'README.md'} says more. {cure}"
    )
