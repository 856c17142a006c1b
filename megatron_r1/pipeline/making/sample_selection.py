"""What becomes of a chunk of samples: filtered, judged, without duplicates, chosen, rewritten, counted.

Between the samples (`chunks.py` of this room) and the rows of a `sample` stage. The rules are in `data/selection.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import SampleStage
from megatron_r1.data.selection import Candidate, Reason, choose, fault, first_of_text
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.judges.correctness import Claim, judge_correctness
from megatron_r1.judges.rewriting import Draft, Rewritten, rewrite
from megatron_r1.pipeline.making.card_parts import Counts, by_name
from megatron_r1.pipeline.making.chunks import Chunk, Outcome
from megatron_r1.pipeline.making.hooks import open_judge, open_rewriter
from megatron_r1.pipeline.making.sample_card import REASONS
from megatron_r1.rewards.accuracy import ACCEPT, JUDGE
from megatron_r1.rewards.extract import summary_of, thought_of
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.types import Completion, FinishReason, Group, LanguageUse, Prompt, VerdictStatus


@dataclass(slots=True)
class _Asked:
    """A prompt and its samples, on their way through the rules."""

    prompt: Prompt
    language: str
    candidates: list[Candidate]  # those not dropped so far
    dropped: Counter[str]
    texts: dict[int, Rewritten]  # sample -> what it was rewritten to

    def drop(self, reasons: Mapping[int, Reason]) -> None:
        """Drop samples by their number."""
        self.dropped.update(reasons.values())
        self.candidates = [c for c in self.candidates if c.sample not in reasons]


class Selection:
    """The work on a chunk: filter, judge, leave out duplicates, choose, rewrite. Calls come in the order of chunks.

    Samples of prompts with the verifier "judge" pass the other rules first, so that a judge is asked only about what
    would be kept; "wrong" then counts those among them.
    """

    def __init__(self, stage: SampleStage, tokenizer: Tokenizer, seed: int) -> None:
        self.stage, self.tokenizer, self.seed = stage, tokenizer, seed
        self.judge, self.rewriter = open_judge(stage), open_rewriter(stage)
        self._known: set[str] = set()  # texts of earlier chunks
        self._read = 0  # chunks that these are of

    def __call__(self, chunk: Chunk, earlier: list[dict[str, Any]]) -> Outcome:
        for summary in earlier[self._read :]:
            self._known.update(summary["keys"])
        self._read = len(earlier)
        asked = [self._read_samples(prompt, rows) for prompt, rows in zip(chunk.prompts, chunk.samples, strict=True)]
        for item in asked:
            item.drop(self._faults(item))
        self._judge([item for item in asked if item.prompt.verifier == JUDGE])
        keys = self._choose(asked)
        if self.rewriter is not None:
            self._rewrite(asked)
        return Outcome([row for item in asked for row in self._rows(item)], self._summary(chunk, asked, keys))

    def _faults(self, item: _Asked) -> dict[int, Reason]:
        faults = {c.sample: fault(c, self.stage.filter) for c in item.candidates}
        return {sample: reason for sample, reason in faults.items() if reason is not None}

    def _read_samples(self, prompt: Prompt, rows: Sequence[Mapping[str, Any]]) -> _Asked:
        candidates = [
            Candidate(
                sample=row["sample"],
                thought=thought_of(row["text"]),
                summary=summary_of(row["text"]),
                tokens=row["tokens"],
                status=_status(prompt, row["verdict"]),
                finished=row["finish_reason"] == "stop",
                in_format=row["reward_parts"]["format"] > 0,
                language_share=LanguageUse(**row["language"]).share,
            )
            for row in rows
        ]
        return _Asked(prompt, rows[0]["language"]["target"], candidates, Counter(), {})

    def _judge(self, asked: Sequence[_Asked]) -> None:
        self._ask_judge([(item.prompt, candidate) for item in asked for candidate in item.candidates])
        for item in asked:
            item.drop(self._faults(item))

    def _ask_judge(self, samples: Sequence[tuple[Prompt, Candidate]]) -> None:
        """Set the status of samples whose verifier is "judge"."""
        if not samples:
            return
        assert self.judge is not None, "a stage without a judge has no such prompts"
        claims = [Claim(prompt.question, _reference(prompt), c.summary) for prompt, c in samples]
        for (_, candidate), verdict in zip(samples, judge_correctness(self.judge, claims), strict=True):
            candidate.status = verdict

    def _choose(self, asked: Sequence[_Asked]) -> list[str]:
        """Drop duplicates and what is over the cap; returns the keys of new texts."""
        new: list[str] = []
        for item in asked:
            first, others = first_of_text(item.candidates, item.prompt.question, self._known)
            self._known.update(first)
            new += first
            item.drop({c.sample: "duplicate" for c in others})
            _, over = choose(item.candidates, self.stage.keep, self.stage.prefer, self.seed, item.prompt.id)
            item.drop({c.sample: "over the cap" for c in over})
        return new

    def _rewrite(self, asked: Sequence[_Asked]) -> None:
        assert self.rewriter is not None, "called with a rewriter alone"
        samples = [(item, candidate) for item in asked for candidate in item.candidates]
        drafts = [Draft(i.prompt.question, c.thought, c.summary, i.language) for i, c in samples]
        written = rewrite(self.rewriter, drafts)
        said = [(s, text) for s, text in zip(samples, written, strict=True) if text is not None]
        groups = [Group(prompt=item.prompt, completions=[self._completion(text)]) for (item, _), text in said]
        with VerifierPool(self.stage.verifier_workers) as pool:
            Scorer(measured(self.stage), pool).score_groups(groups)
        rescored = [_rescored(group, c.sample, text) for ((_, c), text), group in zip(said, groups, strict=True)]
        # A judge has said what it thinks of a summary that is still the same.
        self._ask_judge(
            [
                (item.prompt, again)
                for ((item, candidate), text), again in zip(said, rescored, strict=True)
                if item.prompt.verifier == JUDGE and text.summary != candidate.summary and self._passes(again)
            ]
        )
        for ((item, candidate), text), again in zip(said, rescored, strict=True):
            if self._passes(again):
                item.texts[candidate.sample], candidate.tokens = text, again.tokens
        for item in asked:
            item.drop({c.sample: "rewrite" for c in item.candidates if c.sample not in item.texts})

    def _passes(self, candidate: Candidate) -> bool:
        return fault(candidate, self.stage.filter) is None

    def _completion(self, text: Rewritten) -> Completion:
        """What a model would have to say to say this; one that the tokenizer cannot write does not end."""
        whole = f"<think>{text.thought}</think><answer>{text.summary}</answer>"
        try:
            ids = [*self.tokenizer.encode(whole), self.tokenizer.eos_id]
        except UserError:
            ids = []
        finish: FinishReason = "stop" if ids else "abort"
        return Completion(token_ids=ids, log_probs=[], finish_reason=finish, weight_versions=(0, 0), text=whole)

    def _rows(self, item: _Asked) -> list[dict[str, Any]]:
        rows = []
        for candidate in item.candidates:
            thought, summary = item.texts.get(candidate.sample, (candidate.thought, candidate.summary))
            answer = {"role": "assistant", "content": summary, "reasoning_content": thought}
            rows.append(
                {
                    "messages": [{"role": "user", "content": item.prompt.question}, answer],
                    "domain": item.prompt.domain,
                    "prompt_id": item.prompt.id,
                    "source": source_of(item.prompt),
                    "sample": candidate.sample,
                    "tokens": candidate.tokens,
                    "language": item.language,
                    "rewritten": candidate.sample in item.texts,
                }
            )
        return rows

    def _summary(self, chunk: Chunk, asked: Sequence[_Asked], keys: list[str]) -> dict[str, Any]:
        return {
            "chunk": chunk.number,
            "held_out": chunk.held_out,
            "domains": by_name(((item.prompt.domain, _counts(item)) for item in asked), REASONS),
            "sources": by_name(((source_of(item.prompt), _counts(item)) for item in asked), REASONS),
            "languages": dict(sorted(Counter(i.language for i in asked for _ in i.candidates).items())),
            "tokens": [candidate.tokens for item in asked for candidate in item.candidates],
            "keys": keys,
        }


def measured(stage: SampleStage) -> list[RewardConfig]:
    """What samples are scored by, to tell whether they are kept."""
    rules = stage.filter
    return [
        RewardConfig(kind="accuracy", deadline=stage.deadline),
        RewardConfig(kind="format", tags=rules.tags),
        RewardConfig(kind="language", default_language=rules.default_language, han_per_word=rules.han_per_word),
    ]


def source_of(prompt: Prompt) -> str:
    """The name of a prompt's source: a file's, or a task's with its seed."""
    return prompt.id.rpartition(":")[0]


def _status(prompt: Prompt, verdict: VerdictStatus) -> VerdictStatus:
    """Until a judge says otherwise, what no rule looks at is correct."""
    return "correct" if prompt.verifier in (ACCEPT, JUDGE) else verdict


def _reference(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise UserError(
            f'prompt {prompt.id} has no reference answer, which the verifier "judge" compares with; add it, or use the '
            'verifier "none"'
        )
    return prompt.answer


def _rescored(group: Group, sample: int, text: Rewritten) -> Candidate:
    completion = group.completions[0]
    score = completion.score
    assert score is not None and score.language is not None, "the rules above score the language"
    return Candidate(
        sample=sample,
        thought=text.thought,
        summary=text.summary,
        tokens=len(completion.token_ids),
        status=_status(group.prompt, score.verdict.status),
        finished=completion.finish_reason == "stop",
        in_format=score.parts["format"] > 0,
        language_share=score.language.share,
    )


def _counts(item: _Asked) -> Counts:
    rows = len(item.candidates)
    samples = rows + item.dropped.total()
    return Counts(prompts=1, prompts_kept=int(rows > 0), samples=samples, rows=rows, dropped=dict(item.dropped))
