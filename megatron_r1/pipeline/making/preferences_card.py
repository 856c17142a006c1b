"""What a `preferences` stage reports: counts by reason and domain, its metrics, its dataset card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from megatron_r1.config.stages import PreferencesStage
from megatron_r1.data.dataset_card import Card, CardTable, card_files, quantiles, shown_settings
from megatron_r1.data.pair_building import TOLERANCE, Reason
from megatron_r1.pipeline.making import card_parts
from megatron_r1.pipeline.making.card_parts import (
    Counts,
    add,
    counts_by,
    dropped_table,
    held_out,
    held_out_note,
    name_of,
)

REASONS = get_args(Reason)

PAIR_COLUMNS = {
    "prompt": "the question, without a template",
    "chosen": "the better answer",
    "rejected": "the other answer",
    "verdict": "size of the mean verdict: 3 is A>>B, 1 is A>B",
    "votes": "readable verdicts that it is the mean of",
    "chosen_tokens": "of `chosen`",
    "rejected_tokens": "of `rejected`",
    "domain": "kind of the prompt, as its source in the recipe says",
    "prompt_id": "source and row of the prompt",
    "samples": "which of the prompt's samples the two are, from 0",
}
LABEL_COLUMNS = {
    "prompt": "the question, without a template",
    "response": "the answer",
    "label": "1: good (safe), 0: bad",
    "tokens": "of the answer",
    "domain": "kind of the prompt, as its source in the recipe says",
    "prompt_id": "source and row of the prompt",
    "sample": "which of the prompt's samples it is, from 0",
}


class Balanced(NamedTuple):
    """(chosen, rejected) tokens of every pair before and after the balance of lengths, and the rows left by domain."""

    before: list[tuple[int, int]]
    after: list[tuple[int, int]]
    rows: dict[str, int]


def totals(summaries: Sequence[Mapping[str, Any]], balanced: Balanced | None = None) -> Counts:
    """Of some chunks; with the balance of lengths where it was made. Samples are pairs, or single answers."""
    total = card_parts.totals(summaries, REASONS)
    if balanced is not None:
        gone = len(balanced.before) - len(balanced.after)
        total = add((total, Counts(rows=-gone, dropped={"length balance": gone})), REASONS)
    return total


def shares(summaries: Sequence[Mapping[str, Any]], balanced: Balanced | None = None) -> dict[str, float]:
    """The metrics of some chunks."""
    total = totals(summaries, balanced)
    verdicts = [size for summary in summaries for size in summary.get("verdicts", [])]
    metrics = {
        "preferences/kept": total.share(total.rows),
        "preferences/truncated": total.share(total.dropped.get("truncated", 0)),
        "preferences/unreadable": total.share(total.dropped.get("unreadable", 0)),
        "preferences/rows": float(total.rows),
        "preferences/held_out": float(held_out(summaries)),
    }
    if summaries and "verdicts" in summaries[0]:
        metrics["preferences/undecided"] = total.share(total.dropped.get("undecided", 0))
        metrics["preferences/verdict"] = sum(verdicts) / max(len(verdicts), 1)
    else:
        metrics["preferences/good"] = sum(summary["good"] for summary in summaries) / max(total.rows, 1)
    return metrics


def preferences_card(
    stage: PreferencesStage,
    run_name: str,
    weights: str,
    summaries: Sequence[Mapping[str, Any]],
    balanced: Balanced | None,
) -> dict[str, str]:
    """File name -> text of the card. weights: what was sampled from, e.g. "rl1/checkpoints/step-00000600"."""
    total = totals(summaries, balanced)
    domains = counts_by(summaries, "domains", REASONS)
    asked = {name: counts.prompts for name, counts in domains.items()}
    rows = {name: c.rows if balanced is None else balanced.rows.get(name, 0) for name, c in domains.items()}
    facts: dict[str, Any] = {
        "weights": weights,
        "judge": name_of(stage.judge),
        "form": stage.form,
        "sees": stage.shown,
        "prompts": total.prompts,
        "held_out_prompts": held_out(summaries),
        "candidates": total.samples,
        "dropped": total.dropped,
        "domains": {name: {"prompts": asked[name], "rows": rows[name]} for name in asked},
        "good": sum(summary["good"] for summary in summaries) if balanced is None else None,
        "unreadable_votes": sum(summary.get("unreadable_votes", 0) for summary in summaries),
        "tokens": None if balanced is None else _lengths(balanced),
    }
    note = "Each is counted under the first reason that holds, in this order."
    tables = [
        dropped_table(f"Dropped {'pairs' if stage.form == 'pairs' else 'answers'}", "number", total, note),
        CardTable(
            title="By domain",
            columns=["domain", "prompts", "rows"],
            rows=[[name, asked[name], rows[name]] for name in asked],
        ),
    ]
    if balanced is not None:
        tables.append(_length_table(stage, balanced))
    card = Card(
        name=f"{run_name}/{stage.name}",
        what=_what(stage, weights, total) + held_out_note(held_out(summaries)),
        rows=total.rows,
        columns=PAIR_COLUMNS if stage.form == "pairs" else LABEL_COLUMNS,
        tables=tables,
        settings=shown_settings(stage),
        facts={key: value for key, value in facts.items() if value is not None},
    )
    return card_files(card)


def _what(stage: PreferencesStage, weights: str, total: Counts) -> str:
    part = "what follows the thought" if stage.shown == "summary" else "the whole answer, thought included"
    said = (
        f"Answers sampled from `{weights}`, {stage.n} to each of {total.prompts} prompts, judged by "
        f"{name_of(stage.judge)}, "
        f"which was shown {part}."
    )
    if stage.form == "pairs":
        said += (
            f" {stage.votes} verdicts of each pair, with the answers in a random order, were averaged; pairs with a "
            f"mean above {stage.margin:g} in size (of 3) were kept."
        )
    return said


def _lengths(balanced: Balanced) -> dict[str, Any]:
    return {
        when: {side: quantiles([pair[i] for pair in pairs]) for i, side in enumerate(("chosen", "rejected"))}
        for when, pairs in (("before_balance", balanced.before), ("after_balance", balanced.after))
    }


def _length_table(stage: PreferencesStage, balanced: Balanced) -> CardTable:
    note = "Left out at random, by the seed, among the pairs on the longer side, until the means differ by at most "
    return CardTable(
        title="Mean tokens",
        columns=["", "pairs", "chosen", "rejected"],
        rows=[
            [name, len(pairs), *(sum(pair[i] for pair in pairs) / max(len(pairs), 1) for i in (0, 1))]
            for name, pairs in (("judged", balanced.before), ("balanced", balanced.after))
        ],
        note=f"{note}{TOLERANCE:.0%}." if stage.balance_length else "Lengths were not balanced.",
    )
