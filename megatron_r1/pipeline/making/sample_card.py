"""What a `sample` stage reports: counts by reason, domain and source, its metrics, its dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from megatron_r1.config.stages import SampleStage
from megatron_r1.data.dataset_card import Card, CardTable, card_files, quantiles, shown_settings
from megatron_r1.data.selection import Reason
from megatron_r1.pipeline.making.card_parts import (
    Counts,
    counts_by,
    dropped_table,
    held_out,
    held_out_note,
    name_of,
    totals,
)

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


REASONS = get_args(Reason)


def shares(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of some chunks."""
    total, tokens = totals(summaries, REASONS), _tokens(summaries)
    return {
        "sample/accepted": total.share(total.rows),
        "sample/wrong": total.share(total.dropped.get("wrong", 0)),
        "sample/prompts_kept": total.prompts_kept / max(total.prompts, 1),
        "sample/rows": float(total.rows),
        "sample/length": sum(tokens) / max(len(tokens), 1),
        "sample/held_out": float(held_out(summaries)),
    }


def _tokens(summaries: Sequence[Mapping[str, Any]]) -> list[int]:
    return [count for summary in summaries for count in summary["tokens"]]


def sample_card(
    stage: SampleStage, run_name: str, weights: str, summaries: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """File name -> text of the card. weights: what was sampled from, e.g. "rl1/checkpoints/step-00000600"."""
    total = totals(summaries, REASONS)
    by_domain, by_source = (counts_by(summaries, key, REASONS) for key in ("domains", "sources"))
    lengths = quantiles(_tokens(summaries))
    languages = Counter[str]()
    for summary in summaries:
        languages.update(summary["languages"])
    facts = {
        "weights": weights,
        "judge": name_of(stage.judge),
        "rewriter": name_of(stage.rewrite),
        "held_out_prompts": held_out(summaries),
        **asdict(total),
        "tokens": lengths,
        "languages": dict(sorted(languages.items())),
        "domains": {name: asdict(counts) for name, counts in by_domain.items()},
        "sources": {name: asdict(counts) for name, counts in by_source.items()},
    }
    note = "Each is counted under the first reason that holds, in this order (what a judge decides comes last)."
    tables = [
        dropped_table("Dropped samples", "samples", total, note),
        _acceptance("domain", by_domain),
        _acceptance("source", by_source),
    ]
    if lengths:
        tables.append(CardTable(title="Tokens of an answer", columns=list(lengths), rows=[list(lengths.values())]))
    card = Card(
        name=f"{run_name}/{stage.name}",
        what=_what(stage, weights, total) + held_out_note(held_out(summaries)),
        rows=total.rows,
        columns=COLUMNS,
        tables=tables,
        settings=shown_settings(stage),
        facts=facts,
        languages=list(languages),
    )
    return card_files(card)


def _what(stage: SampleStage, weights: str, total: Counts) -> str:
    said = (
        f"Conversations sampled from `{weights}`: {stage.n} answers to each of {total.prompts} prompts, of which the "
        f"correct and readable ones were kept, {stage.keep} a prompt at most; {total.prompts_kept} prompts have one."
    )
    if stage.rewrite is not None:
        said += f" Thought and summary were rewritten by {name_of(stage.rewrite)}."
    return said


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
                *(c.share(x) for x in (c.rows, c.dropped.get("wrong", 0))),
            ]
            for name, c in counts.items()
        ],
    )
