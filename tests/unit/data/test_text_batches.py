"""Which corpus each batch or document comes from, and going on from a state."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import CorpusConfig
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.corpus import Corpus
from megatron_r1.data.text_batches import TextBatches
from megatron_r1.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
CORPORA = [
    CorpusConfig(task="chain_sum", options={"terms": [2, 6]}, styles={"steps": 1}, share=3),
    CorpusConfig(task="requests", styles={"steps": 1}, share=1),
]


def batches(interleave: bool) -> TextBatches:
    return TextBatches(
        CORPORA, TOKENIZER, batch_tokens=256, steps=100, seed=5, exclude=frozenset(), interleave=interleave
    )


def texts(source: TextBatches, first: int, last: int) -> list[list[str]]:
    return [[TOKENIZER.decode(sample.token_ids) for sample in source.take(step)] for step in range(first, last)]


def is_request(text: str) -> bool:
    return text.startswith("describe")


def test_in_order_each_corpus_has_its_share_of_the_steps() -> None:
    kinds = [{is_request(text) for text in batch} for batch in texts(batches(False), 0, 100)]
    assert kinds == [{False}] * 75 + [{True}] * 25


def test_interleaved_documents_come_by_share_and_each_corpus_in_its_own_order() -> None:
    source = batches(True)
    # Whole pools of 32 batches, so that no document that was read is still waiting.
    found = [text for batch in texts(source, 0, 2000) for text in batch]
    requests = [text for text in found if is_request(text)]
    assert abs(len(requests) / len(found) - 0.25) < 4 * (0.1875 / len(found)) ** 0.5
    read = source.corpora[1].position
    corpus = Corpus(CORPORA[1], 5)
    expected = {document.prompt + document.body for document in (next(corpus) for _ in range(read))}
    assert set(requests) <= expected and len(requests) > 0.9 * read
    start = [text for batch in texts(batches(True), 0, 32) for text in batch]
    assert 0.15 < sum(map(is_request, start)) / len(start) < 0.35  # from the first pool on


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("stop", [1, 40, 80])
def test_resumes_to_the_same_batches(interleave: bool, stop: int) -> None:
    whole = texts(batches(interleave), 0, 100)
    first, second = batches(interleave), batches(interleave)
    texts(first, 0, stop)
    second.restore(json.loads(json.dumps(first.state())))
    assert texts(second, stop, 100) == whole[stop:]
