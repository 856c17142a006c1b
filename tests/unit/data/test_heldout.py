"""Which questions count as the same, and the check itself."""

from __future__ import annotations

import pytest

from megatron_r1.data.heldout import heldout_ids, question_hash
from megatron_r1.types import Prompt


def prompt(name: str, question: str) -> Prompt:
    return Prompt(id=name, question=question, text=question, token_ids=[2], answer="1", verifier="integer")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5-6+9=?", " 5 - 6 + 9 = ?\n", True),
        ("What is Two?", "what IS two?", True),
        ("\uff15+1=?", "5+1=?", True),  # full-width digit
        ("Stra\u00dfe", "STRASSE", True),
        ("5-6+9=?", "5+6+9=?", False),
        ("5-6+9=?", "5-6+9=", False),
        ("1+12", "11+2", False),
    ],
)
def test_question_hash(one: str, other: str, same: bool) -> None:
    assert (question_hash(one) == question_hash(other)) is same


def test_hash_is_stable() -> None:
    """Written into checkpoints and compared between processes, so pinned."""
    assert question_hash("5-6+9=?") == "203692057db68431ed22be681877e9bd"


def test_heldout_ids() -> None:
    assert heldout_ids([prompt("a:0", "1+1=?"), "1 + 1 = ?", prompt("a:1", "2+2=?")]) == {
        question_hash("1+1=?"),
        question_hash("2+2=?"),
    }
