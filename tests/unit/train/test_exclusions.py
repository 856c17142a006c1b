"""An evaluation is refused on problems that some stage behind its checkpoint may have trained on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.data.heldout import heldout_ids
from megatron_r1.train.exclusions import check_never_trained_on, record_exclusions
from megatron_r1.types import Prompt


def prompt(question: str) -> Prompt:
    return Prompt(id=question, question=question, text=question, token_ids=[1], answer=None, verifier="integer")


ONE, TWO = prompt("1+1=?"), prompt("2+2=?")


def checkpoint(stage: Path) -> Path:
    return stage / "checkpoints" / "step-00000001"


def test_the_chain_is_followed_to_the_first_weights(tmp_path: Path) -> None:
    base, rl = tmp_path / "base", tmp_path / "rl"
    record_exclusions(base, heldout_ids([ONE]), None, resumed=False)
    record_exclusions(rl, heldout_ids([ONE, TWO]), checkpoint(base), resumed=False)
    check_never_trained_on([ONE], checkpoint(rl))
    check_never_trained_on([ONE, TWO], None)
    with pytest.raises(UserError, match=r"1 of 2 evaluation problems were not held out when .*base was trained"):
        check_never_trained_on([ONE, TWO], checkpoint(rl))


def test_a_resumed_stage_vouches_for_what_it_always_left_out(tmp_path: Path) -> None:
    record_exclusions(tmp_path, heldout_ids([ONE]), None, resumed=False)
    record_exclusions(tmp_path, heldout_ids([ONE, TWO]), None, resumed=True)
    check_never_trained_on([ONE], checkpoint(tmp_path))
    with pytest.raises(UserError, match="1 of 1"):
        check_never_trained_on([TWO], checkpoint(tmp_path))
    record_exclusions(tmp_path, heldout_ids([TWO]), None, resumed=False)  # started anew
    check_never_trained_on([TWO], checkpoint(tmp_path))


def test_foreign_checkpoints_are_only_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_never_trained_on([ONE], checkpoint(tmp_path / "elsewhere"))
    assert "whether it was trained on the evaluation's problems is unknown" in caplog.text
