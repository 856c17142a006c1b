"""A world of one process, and the refusals of `start` before any group is built."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ParallelConfig
from megatron_r1.parallel import world as worlds
from megatron_r1.parallel.world import World


def test_one_process_has_every_role(world: World) -> None:
    assert (world.rank, world.size, world.data_rank, world.data_size) == (0, 1, 0, 1)
    assert world.device == torch.device("cpu")
    assert world.is_last_stage and world.is_leader
    assert world.last_stage_rank == 0
    assert world.all_gather_replicas({"a": [1]}) == [{"a": [1]}]
    assert world.broadcast_in_replica("x") == "x"
    assert world.any(True) is True and world.any(False) is False
    assert world.largest(2.5) == 2.5


@pytest.mark.parametrize(
    ("size", "layout", "words"),
    [
        (3, ParallelConfig(tensor=2), "tensor x pipeline x context = 2 must divide the number of processes (3)"),
        (2, ParallelConfig(data=4), "= 4, but 2 processes"),
        (1, ParallelConfig(expert=2, data=1), "expert x expert_tensor x pipeline = 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, size: int, layout: ParallelConfig, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as caught:
        worlds.start(layout, seed=1)
    assert words in str(caught.value)


def test_ranks_without_a_meeting_point_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not: start the ranks with torchrun or srun"):
        worlds._init_process_group(0, 2, on_cpu=True, timeout_minutes=1)
