"""Emulated FP8 under tensor parallelism: the same blocks where shards hold whole ones, a bounded difference else."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.config.model import ParallelConfig
from tests.dist.fp8_workload import score_and_step
from tests.dist.harness import run_world

pytestmark = pytest.mark.slow


def scores(found: dict[str, Any]) -> np.ndarray:
    return np.array(list(chain.from_iterable(found["scores"])))


def test_tensor_parallelism_changes_less_than_fp8_itself(tmp_path: Path) -> None:
    """Shards of a row-parallel layer cut its 128x128 blocks elsewhere, so scales differ: not equal, but near.

    The communication around the products (gather and reduce-scatter of sequence parallelism) is proved by the loss and
    the gradient norm, which a missing or doubled sum would change by tens of per cent.
    """
    precisions = ["fp32", "fp8-emulated"]
    exact, one = run_world(score_and_step, ParallelConfig(data=1), str(tmp_path), precisions)[0]
    again, two = run_world(score_and_step, ParallelConfig(tensor=2, data=1), str(tmp_path), precisions)[0]
    assert np.abs(scores(again) - scores(exact)).max() < 1e-5
    effect = np.abs(scores(one) - scores(exact)).mean()
    split = np.abs(scores(two) - scores(one)).mean()
    assert 5e-3 < effect < 0.2 and split < effect, (effect, split)
    for key in ("loss", "norm"):
        assert two[key] == pytest.approx(one[key], rel=0.01)
        assert one[key] == pytest.approx(exact[key], rel=0.02) and one[key] != exact[key]
