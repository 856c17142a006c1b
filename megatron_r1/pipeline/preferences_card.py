"""What a `preferences` stage reports: counts by reason and domain, its metrics, its dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from megatron_r1.config.stages import PreferencesStage
from megatron_r1.data.dataset_card import Card, CardTable, Cell, card_files, quantiles, shown_settings
from megatron_r1.data.pair_building import TOLERANCE, Reason

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the candidates, which are pairs or single answers. rows + dropped in all = candidates."""

    prompts: int
    held_out: int
    candidates: int
    rows: int
    dropped: dict[Reason, int]  # in the order of `Reason`


def totals(summaries: Sequence[Mapping[str, Any]], balanced: Balanced | None = None) -> Counts:
    """Of some chunks; with the balance of lengths where it was made."""
    dropped: Counter[Reason] = Counter()
    for summary in summaries:
        dropped.update(summary["dropped"])
    rows = sum(sum(summary["rows"].values()) for summary in summaries)
    if balanced is not None:
        dropped["length balance"] += len(balanced.before) - len(balanced.after)
        rows = len(balanced.after)
    return Counts(
        prompts=sum(sum(summary["prompts"].values()) for summary in summaries),
        held_out=sum(summary["held_out"] for summary in summaries),
        candidates=sum(summary["candidates"] for summary in summaries),
        rows=rows,
        dropped={reason: dropped[reason] for reason in get_args(Reason) if dropped[reason]},
    )


def shares(summaries: Sequence[Mapping[str, Any]], balanced: Balanced | None = None) -> dict[str, float]:
    """The metrics of some chunks."""
    total = totals(summaries, balanced)
    candidates = max(total.candidates, 1)
    verdicts = [size for summary in summaries for size in summary.get("verdicts", [])]
    metrics = {
        "preferences/kept": total.rows / candidates,
        "preferences/truncated": total.dropped.get("truncated", 0) / candidates,
        "preferences/unreadable": total.dropped.get("unreadable", 0) / candidates,
        "preferences/rows": float(total.rows),
        "preferences/held_out": float(total.held_out),
    }
    if summaries and "verdicts" in summaries[0]:
        metrics["preferences/undecided"] = total.dropped.get("undecided", 0) / candidates
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
    asked: Counter[str] = Counter()
    rows: Counter[str] = Counter(None if balanced is None else balanced.rows)
    for summary in summaries:
        asked.update(summary["prompts"])
        if balanced is None:
            rows.update(summary["rows"])
    facts: dict[str, Any] = {
        "weights": weights,
        "judge": _judge(stage),
        "form": stage.form,
        "sees": stage.sees,
        "prompts": total.prompts,
        "held_out_prompts": total.held_out,
        "candidates": total.candidates,
        "dropped": total.dropped,
        "domains": {name: {"prompts": asked[name], "rows": rows[name]} for name in sorted(asked)},
        "good": sum(summary["good"] for summary in summaries) if balanced is None else None,
        "unreadable_votes": sum(summary.get("unreadable_votes", 0) for summary in summaries),
        "tokens": None if balanced is None else _lengths(balanced),
    }
    dropped: list[list[Cell]] = [[why, count, count / max(total.candidates, 1)] for why, count in total.dropped.items()]
    tables = [
        CardTable(
            title=f"Dropped {'pairs' if stage.form == 'pairs' else 'answers'}",
            columns=["reason", "number", "share"],
            rows=[*dropped, ["kept", total.rows, total.rows / max(total.candidates, 1)]],
            note="Each is counted under the first reason that holds, in this order.",
        ),
        CardTable(
            title="By domain",
            columns=["domain", "prompts", "rows"],
            rows=[[name, asked[name], rows[name]] for name in sorted(asked)],
        ),
    ]
    if balanced is not None:
        tables.append(_length_table(stage, balanced))
    card = Card(
        name=f"{run_name}/{stage.name}",
        what=_what(stage, weights, total),
        rows=total.rows,
        columns=PAIR_COLUMNS if stage.form == "pairs" else LABEL_COLUMNS,
        tables=tables,
        settings=shown_settings(stage),
        facts={key: value for key, value in facts.items() if value is not None},
    )
    return card_files(card)


def _what(stage: PreferencesStage, weights: str, total: Counts) -> str:
    part = "what follows the thought" if stage.sees == "summary" else "the whole answer, thought included"
    said = (
        f"Answers sampled from `{weights}`, {stage.n} to each of {total.prompts} prompts, judged by {_judge(stage)}, "
        f"which was shown {part}."
    )
    if stage.form == "pairs":
        said += (
            f" {stage.votes} verdicts of each pair, with the answers in a random order, were averaged; pairs with a "
            f"mean above {stage.margin:g} in size (of 3) were kept."
        )
    if total.held_out:
        said += f" {total.held_out} prompts were not asked, as an evaluation asks them."
    return said


def _judge(stage: PreferencesStage) -> str:
    """The model of a server, or the function."""
    judge = stage.judge
    return judge.server.model if judge.server is not None else str(judge.call).rpartition("/")[2]


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
