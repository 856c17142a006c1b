"""Preference pairs: tokens, order, what is left out and counted, resuming, micro-batches of whole pairs, refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import PairsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.batching import make_micro_batches
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.preference_pairs import PreferencePairs
from megatron_r1.data.reward_rows import RewardBatches, sequences
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.types import PreferencePair, Sample

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
ROWS = [{"prompt": f"{i}+1=?", "chosen": str(i + 1), "rejected": "x" * (1 + i)} for i in range(9)]


def write(folder: Path, rows: list[Any] = ROWS) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path, **keys: Any) -> PreferencePairs:
    return PreferencePairs(PairsConfig(**{"source": "jsonl", "path": path, **keys}), TOKENIZER)


def batches(path: Path, shuffle: bool = True, **keys: Any) -> RewardBatches[PreferencePair]:
    return RewardBatches(
        source(path), **{"shuffle": shuffle, "seed": 1, "exclude": frozenset(), "max_tokens": 99, **keys}
    )


def test_a_pair_is_template_answer_and_end(tmp_path: Path) -> None:
    pair = source(write(tmp_path), template="Q: {prompt} A:")[3]
    assert (pair.id, pair.question) == ("pairs.jsonl:3", "3+1=?")
    prompt = TOKENIZER.encode("Q: 3+1=? A:")
    assert pair.chosen.token_ids == [*prompt, *TOKENIZER.encode("4"), TOKENIZER.eos_id]
    assert pair.rejected.token_ids == [*prompt, *TOKENIZER.encode("xxxx"), TOKENIZER.eos_id]
    assert pair.chosen.prompt_length == pair.rejected.prompt_length == len(prompt)


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    table = source(tmp_path / "pairs.parquet", source="parquet")
    lines = source(write(tmp_path))
    assert [table[i].chosen for i in range(9)] == [lines[i].chosen for i in range(9)]
    pq.write_table(pa.Table.from_pylist([*ROWS, {**ROWS[0], "chosen": None}]), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet, row 9: column 'chosen' holds None"):
        source(tmp_path / "bad.parquet", source="parquet")


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    # Prompts have 5 tokens, so that rejected answers of 6 and more x are beyond 11 tokens with the end.
    pairs = batches(write(tmp_path), shuffle=False, max_tokens=11, exclude=heldout_ids(["2+1=?"]))
    taken = [pair.question for pair in pairs.take(8)]
    assert taken == [f"{i}+1=?" for i in (0, 1, 3, 4)] * 2
    assert (pairs.excluded, pairs.too_long) == (2, 4)
    pairs.take(1)
    assert (pairs.excluded, pairs.too_long) == (2, 8)


@pytest.mark.parametrize("taken", [0, 3, 8, 9, 20])
def test_resuming_gives_the_same_pairs(tmp_path: Path, taken: int) -> None:
    path = write(tmp_path)
    whole = batches(path, max_tokens=12)
    whole.take(taken)
    state = json.loads(json.dumps(whole.state()))
    again = batches(path, max_tokens=12)
    again.restore(state)
    assert again.take(15) == whole.take(15)
    assert again.state() == whole.state()


def test_pairs_stay_together_in_micro_batches(tmp_path: Path) -> None:
    samples = sequences(batches(write(tmp_path)).take(9))
    for packed in (True, False):
        shards = make_micro_batches(samples, 45, 0, packed=packed, sequence_multiple_of=4, shards=2, together=2)
        assert len(shards[0]) == len(shards[1]) > 1
        rows = [batch for shard in shards for batch in shard]
        indices = [index for batch in rows for index in batch.sample_indices]
        assert sorted(indices) == list(range(18))
        assert all(b == a + 1 and a % 2 == 0 for a, b in list(pairwise(indices))[::2])
        for batch in rows:
            ends = [batch.tokens_BT.flatten()[last].item() for last in batch.last_N]
            assert ends == [TOKENIZER.eos_id] * len(batch.sample_indices)
            assert batch.padded_tokens <= 45 or len(batch.sample_indices) == 2


@pytest.mark.parametrize("packed", [True, False])
def test_last_tokens_are_found_in_context_slices(packed: bool) -> None:
    """Each by exactly one rank, at the place where that rank holds it."""
    samples = [Sample(token_ids=list(range(10 * i + 1, 10 * i + 2 + i)), prompt_length=1) for i in range(6)]
    (batch,) = make_micro_batches(samples, 400, 0, packed=packed, sequence_multiple_of=4, together=2)[0]
    parts = [batch.context_slice(2, rank) for rank in range(2)]
    for n, index in enumerate(batch.sample_indices):
        held = [part for part in parts if part.last_N[n] >= 0]
        assert len(held) == 1
        assert held[0].tokens_BT.flatten()[held[0].last_N[n]] == samples[index].token_ids[-1]


def test_units_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 samples do not divide into units of 2"):
        make_micro_batches([Sample(token_ids=[1], prompt_length=1)] * 3, 9, 0, packed=True, together=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "chosen": "2"}, r"pairs\.jsonl:2: no column 'rejected'.*Set rejected_key to the right one"),
        ({**ROWS[0], "chosen": 4}, r"pairs\.jsonl:2: column 'chosen' holds 4; prompt and answers of a pair are texts"),
        ({**ROWS[0], "prompt": " "}, r"pairs\.jsonl:2: column 'prompt' holds ' '"),
        ({**ROWS[0], "rejected": "1"}, r"pairs\.jsonl:2: columns 'chosen' and 'rejected' hold the same answer"),
    ],
)
def test_bad_rows_are_refused_at_the_start(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(write(tmp_path, [ROWS[0], row]))


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.path: .*none\.jsonl' does not exist"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no rows; one pair is needed at least"):
        source(write(tmp_path, []))
    with pytest.raises(
        UserError, match=r"pairs: no pair of pairs\.jsonl keeps within 6 tokens a sequence \(max_length"
    ):
        batches(write(tmp_path), max_tokens=6).take(1)
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: .*'é'"):
        source(write(tmp_path, [{**ROWS[0], "chosen": "é"}]))[0]
    with pytest.raises(ValueError, match=r"template 'Solve' has no \{prompt\} field"):
        PairsConfig(source="jsonl", path=tmp_path, template="Solve")
