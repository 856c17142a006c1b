"""Pre-training batches: documents of similar length, about `batch_tokens` tokens a global batch.

Documents are read in pools of a fixed number of tokens; a pool is sorted by length, cut into batches and the batches
shuffled. So padding stays small, and (pool start, batches taken) is the whole state.
"""

from __future__ import annotations

import random
from typing import Any

from megatron_r1.config.data import CorpusConfig
from megatron_r1.data.corpus import Corpus
from megatron_r1.data.generators import keyed_random
from megatron_r1.data.tokenizers import Tokenizer, encode_prompt
from megatron_r1.types import Sample

_BATCHES_A_POOL = 32


class TextBatches:
    """Endless batches of one stage's corpora: each corpus for its share of the steps, in order, or, with `interleave`,
    of documents drawn from all of them by share.
    """

    def __init__(
        self,
        corpora: list[CorpusConfig],
        tokenizer: Tokenizer,
        *,
        batch_tokens: int,
        steps: int,
        seed: int,
        exclude: frozenset[str],
        interleave: bool = False,
    ) -> None:
        self.tokenizer, self.batch_tokens, self.seed = tokenizer, batch_tokens, seed
        self.corpora = [Corpus(config, seed, exclude) for config in corpora]
        total = sum(config.share for config in corpora)
        ends = [sum(config.share for config in corpora[: i + 1]) / total for i in range(len(corpora))]
        self._shares = [config.share for config in corpora] if interleave else None
        self._last_steps = [steps] if interleave else [round(end * steps) for end in ends]
        self._which = 0
        self._pool: list[list[Sample]] = []
        self._pool_start = self._pool_state()
        self._taken = 0  # batches taken of the pool

    @property
    def excluded(self) -> int:
        """Documents skipped because they ask a held-out question."""
        return sum(corpus.excluded for corpus in self.corpora)

    def take(self, step: int) -> list[Sample]:
        """The global batch of optimizer step `step`, counted from 0."""
        which = next((i for i, last in enumerate(self._last_steps) if step < last), len(self._last_steps) - 1)
        if which != self._which:
            self._which, self._pool, self._taken = which, [], 0
        if self._taken == len(self._pool):
            self._refill()
        self._taken += 1
        return self._pool[self._taken - 1]

    def metrics(self) -> dict[str, float]:
        """What was left out so far."""
        return {"data/held_out_skips": float(self.excluded)}

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as JSON."""
        return {**self._pool_start, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as if the batches before `state` had been taken."""
        self._which = state["which"]
        for corpus, saved in zip(self.corpora, state["corpora"], strict=True):
            corpus.restore(saved)
        self._pool, self._taken = [], 0
        if state["taken"]:
            self._refill()
            self._taken = state["taken"]

    def _pool_state(self) -> dict[str, Any]:
        return {"which": self._which, "corpora": [corpus.state() for corpus in self.corpora]}

    def _refill(self) -> None:
        self._pool_start = self._pool_state()
        order = random.Random(f"{self.seed} {self._which} {self.corpora[self._which].position}")
        samples: list[Sample] = []
        tokens = 0
        while tokens < _BATCHES_A_POOL * self.batch_tokens:
            samples.append(self._sample(self._next_corpus()))
            tokens += len(samples[-1].token_ids)
        samples.sort(key=lambda sample: len(sample.token_ids))
        self._pool, batch, filled = [], [], 0
        for sample in samples:
            batch.append(sample)
            filled += len(sample.token_ids)
            if filled >= self.batch_tokens:
                self._pool.append(batch)
                batch, filled = [], 0
        if self._pool and 2 * filled < self.batch_tokens:
            self._pool[-1] += batch  # the longest documents: never dropped, and no tiny batch of their own
        else:
            self._pool.append(batch)
        order.shuffle(self._pool)
        self._taken = 0

    def _next_corpus(self) -> Corpus:
        """That of the next document; which one depends only on how many were read of all."""
        if self._shares is None:
            return self.corpora[self._which]
        read = sum(corpus.position for corpus in self.corpora)
        return keyed_random("interleave", self.seed, read).choices(self.corpora, self._shares)[0]

    def _sample(self, corpus: Corpus) -> Sample:
        document = next(corpus)
        prompt = encode_prompt(self.tokenizer, document.prompt)
        body = self.tokenizer.encode(document.body)
        return Sample(token_ids=[*prompt, *body, self.tokenizer.eos_id], prompt_length=len(prompt))
