"""Work beside the main thread: its result, its errors, and a stop that does not wait for it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.judges.endpoint import JudgeDown
from megatron_r1.parallel.world import World
from megatron_r1.pipeline.making import aside
from megatron_r1.train.stopping import Stopped


def context(world: World, stopping: bool = False) -> Any:
    return SimpleNamespace(world=world, stop=SimpleNamespace(agreed=lambda: stopping))


def test_the_result_comes_from_another_thread(world: World) -> None:
    main = threading.get_ident()
    assert aside.on_rank_0(lambda: threading.get_ident() != main, context(world), "s", "kept") is True
    assert aside.on_rank_0(lambda: None, context(world), "s", "kept") is None


def test_errors_arrive_as_they_are_or_as_a_failed_run(world: World) -> None:
    def fail(error: BaseException) -> Any:
        def work() -> None:
            raise error

        return lambda: aside.on_rank_0(work, context(world), "cold", "kept")

    with pytest.raises(UserError, match=r"^a mistake$"):
        fail(UserError("a mistake"))()
    with pytest.raises(JudgeDown, match=r"^gone$"):
        fail(JudgeDown("gone"))()
    with pytest.raises(RunFailed, match="stage cold failed: ValueError: broken"):
        fail(ValueError("broken"))()


def test_a_stop_leaves_the_work_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "_LOOK_SECONDS", 0.05)
    forever = threading.Event()
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped in stage cold; chunks stay"):
        aside.on_rank_0(forever.wait, context(world, stopping=True), "cold", "chunks stay")
    assert time.monotonic() - began < 5
    forever.set()
