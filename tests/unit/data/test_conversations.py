"""Conversations: rows to messages, order, what is left out and counted, cutting, resuming, refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import ConversationsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.config.stages import SftStage
from megatron_r1.data.conversations import ConversationBatches, Conversations, open_heldout, questions_of
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.types import Message, Sample

CHAR = build_tokenizer(TokenizerConfig(kind="char"))
USER, SAID = {"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}
ROWS = [{"prompt": f"{i}+1=?", "response": "x" * (1 + i)} for i in range(9)]


def write(folder: Path, rows: list[Any] = ROWS) -> Path:
    """Rows as JSON lines; texts as they stand."""
    path = folder / "chat.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def source(path: Path, **keys: Any) -> Conversations:
    return Conversations(ConversationsConfig(**{"source": "jsonl", "path": path, **keys}))


def batches(
    path: Path,
    max_tokens: int = 99,
    exclude: frozenset[str] = frozenset(),
    stage: dict[str, Any] | None = None,
    **keys: Any,
) -> ConversationBatches:
    data = ConversationsConfig(**{"source": "jsonl", "path": path, **keys})
    made = SftStage(name="s", kind="sft", epochs=1, data=data, format="r1", template="plain", **(stage or {}))
    return ConversationBatches(made, data, CHAR, max_tokens=max_tokens, seed=1, exclude=exclude)


def texts(samples: list[Sample]) -> list[str]:
    return [CHAR.decode(sample.token_ids) for sample in samples]


def test_rows_of_messages_and_of_prompt_and_response(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "3", "reasoning_content": "hm", "name": "R1", "tool_calls": None}
    rows = [
        {"messages": [{"role": "system", "content": "S", "reasoning_content": None}, USER, SAID, USER, thought]},
        {"messages": None, "prompt": "a", "response": "b", "reasoning_content": ""},
        {"prompt": "a", "response": "b", "reasoning_content": "c", "id": 5},
    ]
    found = source(write(tmp_path, rows))
    assert found[0].messages == [
        Message("system", "S"), Message("user", "1+1=?"), Message("assistant", "2"),
        Message("user", "1+1=?"), Message("assistant", "3", "hm"),
    ]  # fmt: skip
    assert found[1].messages == [Message("user", "a"), Message("assistant", "b")]
    third = [Message("user", "a"), Message("assistant", "b", "c")]
    assert found[2].messages == third
    assert (found[2].id, found[2].where, found[2].question) == ("chat.jsonl:2", f"{tmp_path}/chat.jsonl:3", "a")
    named = {"q": "a", "a": "b", "thought": "c"}
    keys = {"prompt_key": "q", "response_key": "a", "reasoning_key": "thought"}
    assert source(write(tmp_path, [named]), **keys)[0].messages == third
    turns = source(write(tmp_path, [{"turns": [USER, {**SAID, "thought": "t"}]}]), messages_key="turns", **keys)
    assert turns[0].messages == [Message("user", "1+1=?"), Message("assistant", "2", "t")]


def test_parquet_and_datasets_give_the_same(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"messages": [{**USER, "content": str(i)}, {**SAID, "reasoning_content": "t"}]} for i in range(4)]
    bad = {"messages": [USER]}
    pq.write_table(pa.Table.from_pylist([*rows[:2], bad, *rows[2:]]), tmp_path / "chat.parquet")
    lines = source(write(tmp_path, rows))
    for kind in ("parquet", "datasets"):
        table = source(tmp_path / "chat.parquet", source=kind, max_bad_rows=1)
        assert [table[i].messages for i in range(4)] == [lines[i].messages for i in range(4)]
        assert (len(table), table.bad.count, table[2].id) == (4, 1, "chat.parquet:3")
        assert len(source(tmp_path / "chat.parquet", source=kind, max_bad_rows=1, size=3)) == 3
        with pytest.raises(UserError, match=r"chat\.parquet, row 2: the roles are user"):
            source(tmp_path / "chat.parquet", source=kind)


def test_batches_are_the_rows_in_order_or_a_permutation_an_epoch(tmp_path: Path) -> None:
    path = write(tmp_path)
    expected = [f"{i}+1=?{'x' * (1 + i)}" for i in range(9)]
    plain = batches(path, shuffle=False)
    assert texts(plain.take(5)) + texts(plain.take(4)) == expected
    assert plain.metrics()["data/epoch"] == pytest.approx(1.0)
    shuffled = batches(path)
    first, second = texts(shuffled.take(9)), texts(shuffled.take(9))
    assert sorted(first) == sorted(second) == expected and first != second and first != expected
    sample = plain.take(1)[0]
    assert sample.loss_mask == [0] * 5 + [1, 1] and sample.token_ids[-1] == CHAR.eos_id


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    # A question has 5 tokens and the end one, so that answers of 6 and more x are beyond 11 tokens.
    found = batches(write(tmp_path), shuffle=False, max_tokens=11, exclude=heldout_ids([" 2+1 = ?"]))
    assert texts(found.take(8)) == [f"{i}+1=?{'x' * (1 + i)}" for i in (0, 1, 3, 4)] * 2
    assert (found.excluded, found.too_long, found.truncated) == (2, 4, 0)
    assert found.metrics() == {
        "data/epoch": pytest.approx(1 + 5 / 9),
        "data/held_out_skips": 2,
        "data/too_long": 4,
        "data/truncated": 0,
        "data/bad_rows": 0,
    }


def test_a_held_out_question_is_found_in_every_turn(tmp_path: Path) -> None:
    rows = [{"messages": [USER, SAID, {"role": "user", "content": "thanks"}, SAID]}, ROWS[0]]
    path = write(tmp_path, rows)
    assert texts(batches(path, exclude=heldout_ids(["1+1=?"])).take(2)) == ["0+1=?x"] * 2
    assert texts(batches(path, exclude=heldout_ids(["thanks"])).take(2)) == ["0+1=?x"] * 2
    stage = SftStage(
        name="s", kind="sft", epochs=1, format="r1", template="plain",
        data={"source": "jsonl", "path": path}, heldout={"source": "jsonl", "path": path, "size": 1},
    )  # fmt: skip
    assert questions_of(open_heldout(stage, CHAR, 99)) == heldout_ids(["1+1=?", "thanks"])


def test_cutting_keeps_what_fits_and_leaves_out_what_has_no_answer_left(tmp_path: Path) -> None:
    rows = [
        {"prompt": "abc", "response": "defg"},
        {"prompt": "a" * 6, "response": "b"},
        {"prompt": "a", "response": "b"},
    ]
    found = batches(write(tmp_path, rows), shuffle=False, max_tokens=6, stage={"too_long": "truncate"})
    one, two = found.take(2)
    assert (CHAR.decode(one.token_ids), one.loss_mask) == ("abcdef", [0, 0, 0, 1, 1, 1])
    assert (CHAR.decode(two.token_ids), two.token_ids[-1]) == ("ab", CHAR.eos_id)
    assert (found.truncated, found.too_long) == (1, 1)


@pytest.mark.parametrize("taken", [0, 3, 8, 9, 20])
def test_resuming_gives_the_same_conversations(tmp_path: Path, taken: int) -> None:
    path = write(tmp_path, [*ROWS, {"prompt": "é", "response": "e"}, "{"])
    arguments: dict[str, Any] = {"max_tokens": 12, "exclude": heldout_ids(["2+1=?"]), "max_bad_rows": 2}
    whole = batches(path, **arguments)
    if taken:
        whole.take(taken)
    state = json.loads(json.dumps(whole.state()))
    again = batches(path, **arguments)
    again.restore(state)
    assert again.take(15) == whole.take(15)
    assert again.state() == whole.state()
    assert again.metrics() == whole.metrics()
    assert again.metrics()["data/bad_rows"] == 2  # the row that is no JSON, and once the one that cannot be encoded


def test_bad_rows_are_reported_counted_and_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, [ROWS[0], "{", ROWS[1], {"prompt": "a"}, "", {"prompt": "é", "response": "b"}])
    with pytest.raises(UserError, match=r"chat\.jsonl:2: not valid JSON"):
        source(path)
    with pytest.raises(UserError, match=r"chat\.jsonl:4: neither a column .*\(bad row 2; max_bad_rows = 1\)"):
        source(path, max_bad_rows=1)
    with caplog.at_level(logging.WARNING):
        found = batches(path, shuffle=False, max_bad_rows=2)
    assert "left out, bad row 1 of at most 2" in caplog.text and "chat.jsonl:4" in caplog.text
    with pytest.raises(UserError, match=r"chat\.jsonl:6: the char tokenizer has no token for 'é'.*max_bad_rows = 2"):
        found.take(3)
    found = batches(path, shuffle=False, max_bad_rows=3)
    assert texts(found.take(5)) == ["0+1=?x", "1+1=?xx"] * 2 + ["0+1=?x"]
    assert found.metrics()["data/bad_rows"] == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"neither a column 'messages' nor 'prompt' and 'response'; it has 'text'\. Set messages_key"),
        ({"prompt": "a", "response": None}, r"message 2 \(assistant\) has the content None"),
        ({"prompt": " ", "response": "a"}, r"message 1 \(user\) has the content ' '"),
        ({"messages": []}, r"column 'messages' holds \[\]; it must be a list"),
        ({"messages": None}, r"column 'messages' is empty"),
        ({"messages": "hello"}, r"column 'messages' holds 'hello'"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"message 1 is .*an object with `role` and `content`"),
        (
            {"messages": [{"role": "human", "content": "a"}, SAID]},
            r"message 1 has the role 'human'; allowed are system, user, assistant",
        ),
        ({"messages": [USER]}, r"the roles are user; allowed is"),
        ({"messages": [SAID]}, r"the roles are assistant; allowed is"),
        ({"messages": [USER, SAID, SAID]}, r"the roles are user, assistant, assistant"),
        ({"messages": [USER, USER, SAID, SAID]}, r"the roles are user, user, assistant, assistant"),
        ({"messages": [{"role": "system", "content": "S"}]}, r"the roles are system"),
        ({"messages": [USER, {**SAID, "tool_calls": [1]}]}, r"message 2 calls a tool"),
        (
            {"messages": [{**USER, "reasoning_content": "t"}, SAID]},
            r"message 1 \(user\): 'reasoning_content' is a text",
        ),
        (
            {"messages": [USER, {**SAID, "reasoning_content": 3}]},
            r"message 2 \(assistant\): 'reasoning_content' is a text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "a"}]},
            r"message 2 gives its thought twice",
        ),
    ],
)
def test_rows_that_are_no_conversation(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl:2: " + message):
        source(write(tmp_path, [ROWS[0], row]))


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*none\.jsonl' does not exist"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"data\.path: .*holds no rows; one conversation is needed at least"):
        source(write(tmp_path, []))
    with pytest.raises(UserError, match=r"none of the 9 conversations of chat\.jsonl can be trained on: .*6 tokens"):
        batches(write(tmp_path), max_tokens=6).take(1)
    with pytest.raises(ValueError, match=r"source 'jsonl' has no option split; allowed are: none"):
        ConversationsConfig(source="jsonl", path=tmp_path, options={"split": "train"})
    state = batches(write(tmp_path)).state()
    with pytest.raises(UserError, match="length was 9 when the checkpoint was written and is 8 now"):
        batches(write(tmp_path, ROWS[:8])).restore(state)
