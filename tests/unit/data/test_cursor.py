"""Epochs are permutations, resuming is exact at every position, held-out prompts never come."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.data.cursor import PromptCursor, epoch_order
from megatron_r1.data.heldout import question_hash
from megatron_r1.data.prompts import PromptSource, PromptStream
from megatron_r1.types import Prompt


def prompt(index: int) -> Prompt:
    return Prompt(
        id=f"s:{index}",
        question=f"{index}+1=?",
        text="",
        token_ids=[2],
        answer=str(index + 1),
        verifier="integer",
    )


class Source:
    """`length` prompts by index."""

    def __init__(self, length: int, name: str = "s") -> None:
        self.length, self.name = length, name

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Prompt:
        return prompt(index)


class Stream:
    """`length` prompts in an order that only the seed and epoch tell; counts its openings."""

    name = "stream"

    def __init__(self, length: int) -> None:
        self.length, self.openings = length, 0

    def stream(self, epoch: int, seed: int | None, start: int = 0) -> Iterator[Prompt]:
        self.openings += 1
        order = list(epoch_order(self.length, seed, epoch))
        return (prompt(index) for index in order[start:])


def numbers(prompts: list[Prompt]) -> list[int]:
    return [int(one.id[2:]) for one in prompts]


SOURCES = [Source(7), Stream(7)]


def test_protocols_tell_the_two_kinds_apart() -> None:
    assert isinstance(Source(1), PromptSource) and not isinstance(Source(1), PromptStream)
    assert isinstance(Stream(1), PromptStream) and not isinstance(Stream(1), PromptSource)


@pytest.mark.parametrize("source", SOURCES)
def test_without_shuffling_epochs_repeat(source: Source | Stream) -> None:
    cursor = PromptCursor(source, shuffle=False, seed=0)
    assert numbers(cursor.take(5)) == [0, 1, 2, 3, 4]
    assert (cursor.epoch, cursor.position) == (0, 5)
    assert numbers(cursor.take(11)) == [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert (cursor.epoch, cursor.position) == (2, 2)


@pytest.mark.parametrize("source", SOURCES)
def test_each_epoch_is_another_permutation(source: Source | Stream) -> None:
    cursor = PromptCursor(source, shuffle=True, seed=3)
    epochs = [tuple(numbers(cursor.take(7))) for _ in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 17
    again = PromptCursor(source, shuffle=True, seed=3)
    assert numbers(again.take(140)) == [number for epoch in epochs for number in epoch]
    other = PromptCursor(source, shuffle=True, seed=4)
    assert tuple(numbers(other.take(7))) != epochs[0]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_resume_at_every_position(source: Source | Stream, shuffle: bool) -> None:
    exclude = frozenset({question_hash(prompt(2).question)})
    whole = PromptCursor(source, shuffle, 1, exclude)
    everything = numbers(whole.take(20))
    for cut in range(21):
        first = PromptCursor(source, shuffle, 1, exclude)
        first.take(cut)
        second = PromptCursor(source, shuffle, 1, exclude)
        second.restore(json.loads(json.dumps(first.state())))
        assert numbers(second.take(20 - cut)) == everything[cut:]
        assert second.state() == whole.state()


def test_restore_into_a_used_cursor() -> None:
    cursor = PromptCursor(Source(7), True, 1)
    state = cursor.state()
    start = numbers(cursor.take(9))
    cursor.restore(state)
    assert numbers(cursor.take(9)) == start


def test_excluded_prompts_never_come_and_are_counted() -> None:
    exclude = frozenset(question_hash(f" {index} + 1 = ?") for index in (0, 3))
    cursor = PromptCursor(Source(5), True, 0, exclude)
    taken = numbers(cursor.take(9))
    for epoch in range(3):
        assert sorted(taken[3 * epoch : 3 * epoch + 3]) == [1, 2, 4]
    assert cursor.epoch == 2
    assert cursor.excluded == 2 * 2 + (cursor.position - 3)


@pytest.mark.parametrize("source", [Source(3), Stream(3)])
def test_everything_held_out_is_an_error(source: Source | Stream) -> None:
    exclude = frozenset(question_hash(prompt(index).question) for index in range(3))
    cursor = PromptCursor(source, False, 0, exclude)
    with pytest.raises(UserError, match="a whole epoch gives no prompt to train on"):
        cursor.take(1)
    assert cursor.excluded == 6  # both epochs that were read counted


def test_empty_stream_is_an_error() -> None:
    with pytest.raises(UserError, match="prompts stream: a whole epoch gives no prompt"):
        PromptCursor(Stream(0), False, 0).take(1)


def test_one_prompt_left_is_enough() -> None:
    exclude = frozenset(question_hash(prompt(index).question) for index in range(1, 30))
    cursor = PromptCursor(Source(30), True, 0, exclude)
    assert numbers(cursor.take(4)) == [0, 0, 0, 0]


def test_a_stream_is_opened_once_an_epoch() -> None:
    source = Stream(6)
    cursor = PromptCursor(source, True, 0)
    for _ in range(9):
        cursor.take(2)
    assert source.openings == 3


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        (PromptCursor(Source(8), True, 1), "length was 7 .* and is 8 now"),
        (PromptCursor(Source(7, "other"), True, 1), "source was 's' .* and is 'other' now"),
        (PromptCursor(Source(7), False, 1), "shuffle was True .* and is False now"),
        (PromptCursor(Source(7), True, 2), "seed was 1 .* and is 2 now"),
    ],
)
def test_other_prompts_are_refused(cursor: PromptCursor, message: str) -> None:
    state = PromptCursor(Source(7), True, 1).state()
    with pytest.raises(UserError, match=message):
        cursor.restore(state)


def test_order_is_pinned() -> None:
    """A resumed run on another machine must find the same order."""
    assert list(epoch_order(5, None, 3)) == [0, 1, 2, 3, 4]
    orders = [list(epoch_order(5, 0, epoch)) for epoch in (0, 1)]
    assert orders == [[4, 1, 2, 3, 0], [4, 3, 0, 2, 1]]
