"""The presets of the paper's distilled students: what `student` fills in, and that a written key wins."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from megatron_r1.config.optim import STUDENTS, Student
from megatron_r1.config.stages import SftStage

DATA = {"source": "jsonl", "path": "mix.jsonl"}


def stage(**keys: Any) -> SftStage:
    return SftStage.model_validate({"name": "s", "kind": "sft", "data": DATA, **keys})


# DeepSeek-R1 v2, appendix B.4.3.
@pytest.mark.parametrize(
    ("student", "lr"),
    [
        ("qwen-1.5b", 1e-4),
        ("qwen-7b", 8e-5),
        ("qwen-14b", 7e-5),
        ("qwen-32b", 6e-5),
        ("llama-8b", 5e-5),
        ("llama-70b", 2e-5),
    ],
)
def test_a_student_is_the_papers(student: str, lr: float) -> None:
    made = stage(student=student)
    optimizer = made.optimizer
    assert (optimizer.lr, optimizer.schedule) == (lr, "cosine")
    assert optimizer.min_lr == pytest.approx(lr / 10)
    assert (made.batch, made.epochs, made.steps, made.max_length) == (64, 2.0, 0, 32768)
    assert made.planned_steps(804_745) == 25_149  # ceil(2 x 804,745 / 64)


def test_the_table_is_complete() -> None:
    assert set(STUDENTS) == set(get_args(Student))


def test_what_is_written_wins() -> None:
    made = stage(student="llama-8b", batch=32, epochs=3, optimizer={"lr": 1e-3, "warmup_steps": 7})
    assert (made.batch, made.epochs, made.optimizer.lr) == (32, 3.0, 1e-3)
    assert made.optimizer.min_lr == pytest.approx(1e-4)
    assert made.optimizer.warmup_steps == 7
    floor = stage(student="llama-8b", optimizer={"min_lr": 0.0}).optimizer
    assert (floor.lr, floor.min_lr) == (5e-5, 0.0)
    by_steps = stage(student="llama-8b", steps=9)
    assert (by_steps.steps, by_steps.epochs, by_steps.batch) == (9, None, 64)


def test_without_a_student_it_is_the_fine_tuning_of_v3() -> None:
    made = stage(epochs=2)
    assert (made.batch, made.optimizer.lr, made.optimizer.min_lr) == (128, 5e-5, 5e-6)
    with pytest.raises(ValidationError, match="exactly one of `steps` and `epochs`"):
        stage()


def test_a_stage_reads_back_as_it_was_written() -> None:
    """The resolved recipe spells every key, those of the student among them."""
    made = stage(student="qwen-7b", epochs=3)
    again = SftStage.model_validate(made.model_dump(by_alias=True, exclude_none=True))
    assert again == made


def test_an_unknown_student_is_refused() -> None:
    with pytest.raises(ValidationError, match="llama-70b"):
        stage(student="llama-405b")
