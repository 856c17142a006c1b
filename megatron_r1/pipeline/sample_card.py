"""What a `sample` stage reports: counts by reason, domain and source, its metrics, its dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from megatron_r1.config.stages import SampleStage
from megatron_r1.data.dataset_card import Card, CardTable, Cell, card_files, quantiles, shown_settings
from megatron_r1.data.selection import Reason

COLUMNS = {
    "messages": "the question, and the answer with its thought apart, under `reasoning_content`",
    "domain": "kind of the prompt, as its source in the recipe says",
    "prompt_id": "source and row of the prompt",
    "source": "file or task that the prompt comes from",
    "sample": "which of the prompt's samples it was, from 0",
    "tokens": "of the answer, its thought and tags included",
    "language": "of the question",
    "rewritten": "whether thought and summary were rewritten after sampling",
}
"""Columns of data.jsonl."""


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of prompts. Example: Counts(prompts=2, prompts_kept=1, samples=8, rows=1, dropped={"wrong": 7})."""

    prompts: int = 0
    prompts_kept: int = 0  # with a row at least
    samples: int = 0
    rows: int = 0
    dropped: dict[Reason, int] = field(default_factory=dict)  # in the order of `Reason`; samples - rows in all


def add(parts: Iterable[Counts]) -> Counts:
    """The counts of all parts together."""
    total, dropped = Counts(), Counter[Reason]()
    for part in parts:
        total.prompts += part.prompts
        total.prompts_kept += part.prompts_kept
        total.samples += part.samples
        total.rows += part.rows
        dropped.update(part.dropped)
    total.dropped = {reason: dropped[reason] for reason in get_args(Reason) if dropped[reason]}
    return total


def totals(summaries: Sequence[Mapping[str, Any]]) -> Counts:
    """The counts of some chunks."""
    return add(Counts(**counts) for summary in summaries for counts in summary["domains"].values())


def shares(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of some chunks."""
    total, tokens = totals(summaries), _tokens(summaries)
    samples = max(total.samples, 1)
    return {
        "sample/accepted": total.rows / samples,
        "sample/wrong": total.dropped.get("wrong", 0) / samples,
        "sample/prompts_kept": total.prompts_kept / max(total.prompts, 1),
        "sample/rows": float(total.rows),
        "sample/length": sum(tokens) / max(len(tokens), 1),
        "sample/held_out": float(sum(summary["held_out"] for summary in summaries)),
    }


def _tokens(summaries: Sequence[Mapping[str, Any]]) -> list[int]:
    return [count for summary in summaries for count in summary["tokens"]]


def sample_card(
    stage: SampleStage, run_name: str, weights: str, summaries: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """File name -> text of the card. weights: what was sampled from, e.g. "rl1/checkpoints/step-00000600"."""
    total = totals(summaries)
    by_domain, by_source = (_by(summaries, key) for key in ("domains", "sources"))
    lengths = quantiles(_tokens(summaries))
    languages = Counter[str]()
    for summary in summaries:
        languages.update(summary["languages"])
    held_out = sum(summary["held_out"] for summary in summaries)
    facts = {
        "weights": weights,
        "judge": _who(stage.judge),
        "rewriter": _who(stage.rewrite),
        "held_out_prompts": held_out,
        **asdict(total),
        "tokens": lengths,
        "languages": dict(sorted(languages.items())),
        "domains": {name: asdict(counts) for name, counts in by_domain.items()},
        "sources": {name: asdict(counts) for name, counts in by_source.items()},
    }
    dropped: list[list[Cell]] = [
        [reason, count, count / max(total.samples, 1)] for reason, count in total.dropped.items()
    ]
    tables = [
        CardTable(
            title="Dropped samples",
            columns=["reason", "samples", "share"],
            rows=[*dropped, ["kept", total.rows, total.rows / max(total.samples, 1)]],
            note="Each is counted under the first reason that holds, in this order (what a judge decides comes last).",
        ),
        _acceptance("domain", by_domain),
        _acceptance("source", by_source),
    ]
    if lengths:
        tables.append(CardTable(title="Tokens of an answer", columns=list(lengths), rows=[list(lengths.values())]))
    card = Card(
        name=f"{run_name}/{stage.name}",
        what=_what(stage, weights, total, held_out),
        rows=total.rows,
        columns=COLUMNS,
        tables=tables,
        settings=shown_settings(stage),
        facts=facts,
        languages=list(languages),
    )
    return card_files(card)


def _what(stage: SampleStage, weights: str, total: Counts, held_out: int) -> str:
    said = (
        f"Conversations sampled from `{weights}`: {stage.n} answers to each of {total.prompts} prompts, of which the "
        f"correct and readable ones were kept, {stage.keep} a prompt at most; {total.prompts_kept} prompts have one."
    )
    if stage.rewrite is not None:
        said += f" Thought and summary were rewritten by {_who(stage.rewrite)}."
    if held_out:
        said += f" {held_out} prompts were not asked, as an evaluation asks them."
    return said


def _who(hook: Any) -> str | None:
    """The model of a server, or the function."""
    if hook is None:
        return None
    return str(hook.server.model) if hook.server is not None else str(hook.call).rpartition("/")[2]


def _by(summaries: Sequence[Mapping[str, Any]], key: str) -> dict[str, Counts]:
    names = sorted({name for summary in summaries for name in summary[key]})
    return {name: add(Counts(**s[key][name]) for s in summaries if name in s[key]) for name in names}


def _acceptance(what: str, counts: Mapping[str, Counts]) -> CardTable:
    return CardTable(
        title=f"By {what}",
        columns=[what, "prompts", "with a row", "samples", "rows", "accepted", "wrong"],
        rows=[
            [
                name,
                c.prompts,
                c.prompts_kept,
                c.samples,
                c.rows,
                *(x / max(c.samples, 1) for x in (c.rows, c.dropped.get("wrong", 0))),
            ]
            for name, c in counts.items()
        ],
    )
