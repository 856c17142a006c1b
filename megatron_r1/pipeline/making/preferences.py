"""The `preferences` stage: sampled answers, compared by a judge or labelled one by one, become a reward model's data.

Between a stage that trains a language model and a `reward_model` stage. `chunks.py` of this room samples, `judges/`
judge, `data/pair_building.py` has the rules, `preferences_card.py` says what came of it. Rows hold the raw question and
the answer as the reward model will read it; its own `template` wraps the question, in training as in scoring.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import PreferencesStage
from megatron_r1.data.dataset_card import DATA_FILE
from megatron_r1.data.pair_building import Answer, Reason, balance_lengths, fault, pair_fault, preferred
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.judges.preference import Answered, Pair, compare, label
from megatron_r1.observe.rundir import write_text
from megatron_r1.pipeline.making.aside import on_rank_0
from megatron_r1.pipeline.making.card_parts import Counts, by_name, kept_none, name_of_weights
from megatron_r1.pipeline.making.chunks import Chunk, Outcome, run_chunks
from megatron_r1.pipeline.making.hooks import open_judge
from megatron_r1.pipeline.making.preferences_card import REASONS, Balanced, preferences_card, shares, totals
from megatron_r1.rewards.extract import summary_of
from megatron_r1.train.context import RunContext
from megatron_r1.types import Prompt

MEASURED = (RewardConfig(kind="format"),)
"""Samples have to be scored by something; nothing here depends on it."""


def run_preferences(stage: PreferencesStage, context: RunContext, start: Path | None) -> dict[str, Any]:
    """Write data.jsonl and its card from answers of the weights `start`; returns the counts. Collective.

    Raises UserError when nothing was kept, JudgeDown (see `judges/endpoint.py`), Stopped.
    """
    if start is None:
        raise UserError(f"stage {stage.name!r} has no weights to sample from: set `from` to a stage or a folder")
    work = PairWork(stage, context) if stage.form == "pairs" else LabelWork(stage, context)
    summaries = run_chunks(stage, context, start, MEASURED, work, lambda done: shares(done[-1:]))
    finish = partial(_finish, stage, context, name_of_weights(start, context.run.path), summaries)
    result: dict[str, Any] = on_rank_0(finish, context, stage.name, "finished chunks are saved")
    return result


class _Work:
    """What both forms do with a chunk. Calls come in the order of chunks; each depends on its chunk alone."""

    def __init__(self, stage: PreferencesStage, context: RunContext) -> None:
        judge = open_judge(stage)
        assert judge is not None, "a preferences stage always has a judge"
        self.stage, self.judge, self.seed = stage, judge, context.config.seed
        self.tokenizer: Tokenizer = context.tokenizer

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The answers of a prompt, as judge and reward model see them."""
        seen = summary_of if self.stage.shown == "summary" else str
        return [self._answer(row, seen(row["text"])) for row in rows]

    def _answer(self, row: Mapping[str, Any], text: str) -> Answer:
        try:
            tokens = len(self.tokenizer.encode(text))
        except UserError:
            tokens = -1
        return Answer(row["sample"], text, tokens, row["finish_reason"] == "stop")


class PairWork(_Work):
    """The first answer against the second, the third against the fourth, ..."""

    def __call__(self, chunk: Chunk, earlier: list[dict[str, Any]]) -> Outcome:
        counted = [Counts(prompts=1, samples=self.stage.n // 2) for _ in chunk.prompts]
        asked: list[tuple[Prompt, Counts, Answer, Answer]] = []
        for prompt, counts, rows in zip(chunk.prompts, counted, chunk.samples, strict=True):
            answers = self.answers(rows)
            for first, second in zip(answers[::2], answers[1::2], strict=True):
                if (reason := pair_fault(first, second)) is not None:
                    counts.drop(reason)
                else:
                    asked.append((prompt, counts, first, second))
        pairs = [Pair(f"{p.id}#{a.sample // 2}", p.question, a.text, b.text) for p, _, a, b in asked]
        kept, verdicts, unreadable = [], [], 0
        compared = compare(self.judge, pairs, self.stage.votes, self.seed) if pairs else []
        for (prompt, counts, first, second), found in zip(asked, compared, strict=True):
            unreadable += found.unreadable
            if found.mean is not None:
                verdicts.append(abs(found.mean))
            outcome = preferred(found.mean, self.stage.margin)
            if outcome == "first" or outcome == "second":
                better, worse = (first, second) if outcome == "first" else (second, first)
                kept.append(_pair_row(prompt, better, worse, abs(found.mean or 0), len(found.votes)))
                counts.keep()
            else:
                counts.drop(outcome)
        votes = {"verdicts": verdicts, "unreadable_votes": unreadable, "votes": len(pairs) * self.stage.votes}
        return Outcome(kept, _summary(chunk, counted, kept) | votes)


class LabelWork(_Work):
    """Every answer by itself."""

    def __call__(self, chunk: Chunk, earlier: list[dict[str, Any]]) -> Outcome:
        counted = [Counts(prompts=1, samples=self.stage.n) for _ in chunk.prompts]
        asked: list[tuple[Prompt, Counts, Answer]] = []
        for prompt, counts, rows in zip(chunk.prompts, counted, chunk.samples, strict=True):
            said: set[str] = set()
            for answer in self.answers(rows):
                reason: Reason | None = fault(answer) or ("duplicate" if answer.text in said else None)
                if reason is not None:
                    counts.drop(reason)
                else:
                    said.add(answer.text)
                    asked.append((prompt, counts, answer))
        labels = label(self.judge, [Answered(p.question, a.text) for p, _, a in asked]) if asked else []
        kept = []
        for (prompt, counts, answer), good in zip(asked, labels, strict=True):
            if good is None:
                counts.drop("unreadable")
            else:
                kept.append(_label_row(prompt, answer, good))
                counts.keep()
        return Outcome(kept, _summary(chunk, counted, kept))


def _pair_row(prompt: Prompt, better: Answer, worse: Answer, verdict: float, votes: int) -> dict[str, Any]:
    return {
        "prompt": prompt.question,
        "chosen": better.text,
        "rejected": worse.text,
        "verdict": verdict,
        "votes": votes,
        "chosen_tokens": better.tokens,
        "rejected_tokens": worse.tokens,
        "domain": prompt.domain,
        "prompt_id": prompt.id,
        "samples": [better.sample, worse.sample],
    }


def _label_row(prompt: Prompt, answer: Answer, good: bool) -> dict[str, Any]:
    return {
        "prompt": prompt.question,
        "response": answer.text,
        "label": int(good),
        "tokens": answer.tokens,
        "domain": prompt.domain,
        "prompt_id": prompt.id,
        "sample": answer.sample,
    }


def _summary(chunk: Chunk, counted: Sequence[Counts], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    domains = [prompt.domain for prompt in chunk.prompts]
    return {
        "chunk": chunk.number,
        "held_out": chunk.held_out,
        "domains": by_name(zip(domains, counted, strict=True), REASONS),
        "good": sum(row.get("label", 0) for row in rows),
    }


def _finish(
    stage: PreferencesStage, context: RunContext, weights: str, summaries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Balance the lengths of the pairs and write the card; on rank 0."""
    folder = context.run.stage(stage.name).path
    data = folder / DATA_FILE
    balanced = None
    if stage.form == "pairs":
        balanced = _balance(data, context.config.seed, apply=stage.balance_length)
    card = preferences_card(stage, context.config.name, weights, summaries, balanced)
    for name, text in card.items():
        write_text(folder / name, text)
    total = totals(summaries, balanced)
    if not total.rows:
        most = max(total.dropped, key=total.dropped.__getitem__, default="")
        raise kept_none(stage.name, stage.form, total, folder, _CURES.get(most, _CURE))
    return {**shares(summaries, balanced), "dropped": total.dropped}


_CURE = "Start from weights that answer better, or ask more prompts"
_CURES = {
    "truncated": "Raise sampling.max_new_tokens, or start from weights that end their answers",
    "duplicate": "Raise sampling.temperature or n",
    "undecided": "Lower `margin`, raise `votes`, or take a judge that sees more difference",
    "unreadable": "Look at what the judge replies: its model, or judge.prompt",
    "length balance": "One side is always longer: set balance_length = false, or let the judge not prefer length",
}
"""Most frequent reason -> what to do about it."""


def _balance(data: Path, seed: int, *, apply: bool) -> Balanced:
    """Leave pairs out of the file until lengths agree; the file is replaced as a whole."""
    lengths: list[tuple[int, int]] = []
    domains: list[str] = []
    with data.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            lengths.append((row["chosen_tokens"], row["rejected_tokens"]))
            domains.append(row["domain"])
    kept = balance_lengths(lengths, seed) if apply else list(range(len(lengths)))
    if len(kept) < len(lengths):
        stay = set(kept)
        temp = data.with_name(f".{data.name}.tmp")
        with data.open("rb") as stream, temp.open("wb") as out:
            out.writelines(line for number, line in enumerate(stream) if number in stay)
            out.flush()
            os.fsync(out.fileno())
        temp.replace(data)
    return Balanced(
        before=lengths,
        after=[lengths[i] for i in kept],
        rows=dict(sorted(Counter(domains[i] for i in kept).items())),
    )
