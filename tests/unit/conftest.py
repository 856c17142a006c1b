"""A one-process Megatron world for the unit tests that need one; starting it imports Megatron, once a session."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from megatron_r1.config.model import ParallelConfig
from megatron_r1.parallel import world as worlds


@pytest.fixture(scope="session")
def world() -> Iterator[worlds.World]:
    """The only process of a gloo world, all sizes 1."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield worlds.start(ParallelConfig(), seed=1234, timeout_minutes=2)
    worlds.stop()
    torch.set_num_threads(threads)
