"""A reward model gives one process's loss, gradient norm and parameters under every layout; its checkpoints reshard."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_r1.config.model import ParallelConfig
from tests.dist.harness import run_layouts, run_world
from tests.dist.layout_table import differences, weights
from tests.dist.reward_workload import STEPS, History, Job, one_process, run

pytestmark = pytest.mark.slow  # the default tier has reward models in tests/dist/test_layouts.py

ONE = ParallelConfig(data=1)
TP2, PP2, CP2 = (ParallelConfig(data=1, **{axis: 2}) for axis in ("tensor", "pipeline", "context"))
DP2 = ParallelConfig(data=2)
TWO: dict[str, tuple[ParallelConfig, Job]] = {
    "TP2": (TP2, Job("train", saved="TP2")),
    "PP2": (PP2, Job("train", saved="PP2")),
    "CP2": (CP2, Job("train", saved="CP2")),
    "DP2, padded rows": (DP2, Job("train", saved="DP2", packed=False)),
    "EP2": (ParallelConfig(data=2, expert=2), Job("train", saved="EP2")),
    "dense TP2 without sequence parallelism": (
        ParallelConfig(data=1, tensor=2, sequence=False),
        Job("train", "tiny-dense", "TP2"),
    ),
    "dense PP2 x VPP2": (ParallelConfig(data=1, pipeline=2, virtual_pipeline=2), Job("train", "tiny-dense", "VPP2")),
    "TP2 goes on": (TP2, Job("resume")),
    "PP2 goes on": (PP2, Job("resume")),
    "TP2 from a language model": (TP2, Job("load", saved="from-TP2")),
    "PP2 from a language model": (PP2, Job("load", saved="from-PP2")),
    "pointwise TP2": (TP2, Job("train", saved="TP2-pointwise", pointwise=True)),
    "pointwise PP2": (PP2, Job("train", saved="PP2-pointwise", pointwise=True)),
    "pointwise CP2": (CP2, Job("train", saved="CP2-pointwise", pointwise=True)),
    "pointwise DP2, padded rows": (DP2, Job("train", saved="DP2-pointwise", packed=False, pointwise=True)),
    "pointwise EP2": (
        ParallelConfig(data=2, expert=2),
        Job("train", saved="EP2-pointwise", pointwise=True),
    ),
    "pointwise dense TP2 without sequence parallelism": (
        ParallelConfig(data=1, tensor=2, sequence=False),
        Job("train", "tiny-dense", "TP2-pointwise", pointwise=True),
    ),
    "pointwise dense PP2 x VPP2": (
        ParallelConfig(data=1, pipeline=2, virtual_pipeline=2),
        Job("train", "tiny-dense", "VPP2-pointwise", pointwise=True),
    ),
}
FOUR: dict[str, tuple[ParallelConfig, Job]] = {
    "TP2 x CP2": (ParallelConfig(data=1, tensor=2, context=2), Job("train", saved="TP2CP2")),
    "TP2 x PP2": (ParallelConfig(data=1, tensor=2, pipeline=2), Job("train", saved="TP2PP2")),
    "PP2 x CP2 x EP2": (ParallelConfig(data=1, pipeline=2, context=2, expert=2), Job("train", saved="PP2CP2EP2")),
    "pointwise TP2 x CP2": (
        ParallelConfig(data=1, tensor=2, context=2),
        Job("train", saved="TP2CP2-pointwise", pointwise=True),
    ),
    "pointwise PP2 x CP2 x EP2": (
        ParallelConfig(data=1, pipeline=2, context=2, expert=2),
        Job("train", saved="PP2CP2EP2-pointwise", pointwise=True),
    ),
}


def run_all(jobs: dict[str, tuple[ParallelConfig, Job]], root: Path) -> dict[str, History]:
    layouts, each = zip(*jobs.values(), strict=True)
    ranks = run_layouts(run, layouts, str(root), each=[(job,) for job in each])
    for name, found in zip(jobs, ranks, strict=True):
        assert all(other == found[0] for other in found), f"{name}: ranks disagree about the metrics"
    return {name: found[0] for name, found in zip(jobs, ranks, strict=True)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, History]:
    return run_world(one_process, ONE, str(root))[0]


@pytest.fixture(scope="module")
def two(root: Path, one: dict[str, History]) -> dict[str, History]:
    return run_all(TWO, root)


def check_trained(
    jobs: dict[str, tuple[ParallelConfig, Job]], found: dict[str, History], one: dict[str, History]
) -> None:
    for name, (_, job) in jobs.items():
        if job.what == "load":
            continue
        alone = one[f"{job.preset} pointwise" if job.pointwise else job.preset]
        expected = alone[:STEPS] if job.what == "train" else alone[STEPS:]
        for (loss, accuracy, norm), (loss_one, accuracy_one, norm_one) in zip(found[name], expected, strict=True):
            assert loss == pytest.approx(loss_one, rel=0, abs=2e-6), name
            assert norm == pytest.approx(norm_one, rel=2e-5), name
            assert accuracy == accuracy_one, name


def check_weights(jobs: dict[str, tuple[ParallelConfig, Job]], root: Path) -> None:
    for name, (_, job) in jobs.items():
        if job.what != "train":
            continue
        alone = "one-pointwise" if job.pointwise else "one"
        reference, found = (weights(root / job.preset / folder, STEPS) for folder in (alone, job.saved))
        assert found.keys() == reference.keys(), name
        assert "scalar_head.weight" in found and not any("output_layer" in key for key in found), name
        largest, mean = differences(found, reference)
        assert largest < 2e-4, name
        assert mean < 1e-6, name


def test_the_workload_tests_something(one: dict[str, History]) -> None:
    for history in one.values():
        assert all(norm > 0.1 for _, _, norm in history)
        assert len({accuracy for _, accuracy, _ in history}) > 1, "pairs are ordered otherwise from step to step"


def test_every_step_equals_one_process(one: dict[str, History], two: dict[str, History]) -> None:
    """Also the step after a checkpoint of one process was loaded, optimizer included, under another layout."""
    check_trained(TWO, two, one)


def test_parameters_equal_one_process(two: dict[str, History], root: Path) -> None:
    check_weights(TWO, root)


def test_a_language_model_gives_the_trunk_and_the_head_is_new(two: dict[str, History], root: Path) -> None:
    """Every value is 0 then: each pair is a tie. Multi-token prediction and the output layer are left behind."""
    source = weights(root / "tiny-moe" / "language-model", 0)
    for name, (_, job) in TWO.items():
        if job.what != "load":
            continue
        assert two[name] == [(pytest.approx(math.log(2), rel=1e-6), 0.5, 0.0)], name
        found = weights(root / "tiny-moe" / job.saved, 0)
        assert not found.pop("scalar_head.weight").any()
        assert {key.split(".")[0] for key in source.keys() - found.keys()} == {"mtp", "output_layer"}
        assert all(torch.equal(found[key], source[key]) for key in found), name


def test_combined_layouts_equal_one_process(one: dict[str, History], root: Path) -> None:
    check_trained(FOUR, run_all(FOUR, root), one)
    check_weights(FOUR, root)
