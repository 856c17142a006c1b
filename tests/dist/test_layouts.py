"""Every layout gives the one-process run's loss, gradient norm and parameters, through the real Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.model import ParallelConfig
from tests.dist.harness import run_layouts, run_world
from tests.e2e.recipes import tensors
from tests.dist.workload import generate, resume, resume_each, save_start, train

ONE = ParallelConfig(data=1)
TWO = {
    "TP2": ParallelConfig(tensor=2, data=1),
    "PP2": ParallelConfig(pipeline=2, data=1),
    "EP2": ParallelConfig(expert=2, data=2),
    "DP2": ParallelConfig(data=2),
    "DP2-replicated-optimizer": ParallelConfig(data=2, distributed_optimizer=False),
}
DENSE = {name: layout for name, layout in TWO.items() if name != "EP2"}
STEPS = 3


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's whole tensors of a checkpoint."""
    return {k: v for k, v in tensors(folder).items() if not k.startswith(("optimizer", "rng"))}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    for preset in ("tiny-moe", "tiny-dense"):
        run_world(save_start, ONE, str(root / preset), preset)
    return root


@pytest.fixture(scope="module", params=[("tiny-moe", "grpo"), ("tiny-moe", "lm"), ("tiny-dense", "grpo")], ids="-".join)
def runs(request: pytest.FixtureRequest, start: Path) -> dict[str, Any]:
    """Histories of the one-process run and of every two-process layout, and where their weights are."""
    preset, kind = request.param
    saved = start / f"{preset}-{kind}"
    arguments = (str(start / preset), preset, kind, STEPS, str(saved))
    layouts = TWO if preset == "tiny-moe" else DENSE
    histories = {"one": run_world(train, ONE, *arguments)[0]}
    for name, ranks in zip(layouts, run_layouts(train, list(layouts.values()), *arguments), strict=True):
        assert ranks[0] == ranks[1], f"{name}: ranks disagree about the metrics"
        histories[name] = ranks[0]
    return {"histories": histories, "saved": saved, "preset": preset, "kind": kind}


def test_first_step_equals_one_process(runs: dict[str, Any]) -> None:
    loss, norm = runs["histories"]["one"][0]
    for name, history in runs["histories"].items():
        assert history[0][0] == pytest.approx(loss, rel=1e-5, abs=1e-6), name
        assert history[0][1] == pytest.approx(norm, rel=1e-5), name


def test_every_step_equals_one_process(runs: dict[str, Any]) -> None:
    for name, history in runs["histories"].items():
        for (loss, norm), (loss_one, norm_one) in zip(history, runs["histories"]["one"], strict=True):
            assert loss == pytest.approx(loss_one, rel=2e-5, abs=2e-6), name
            assert norm == pytest.approx(norm_one, rel=2e-5), name


def test_parameters_equal_one_process(runs: dict[str, Any]) -> None:
    folders = {path.name: path / f"step-{STEPS:08d}" for path in runs["saved"].iterdir()}
    reference = weights(folders.pop("one"))
    assert folders, "no layout was saved"
    for name, folder in folders.items():
        found = weights(folder)
        assert found.keys() == reference.keys(), name
        differences = torch.cat([(found[k].double() - reference[k].double()).abs().flatten() for k in reference])
        # Adam turns rounding of near-zero gradients into sign noise: a few entries move by up to a step.
        assert differences.max() < 2e-4, name
        assert differences.mean() < 1e-6, name


def test_optimizer_state_loads_under_another_layout(runs: dict[str, Any], start: Path) -> None:
    if runs["kind"] == "lm":
        pytest.skip("the policy loss covers it")
    """From one process to every layout, and from every layout back to one process."""
    layouts = TWO if runs["preset"] == "tiny-moe" else DENSE
    chosen = [layout for layout in layouts.values() if layout.distributed_optimizer]
    arguments = (runs["preset"], runs["kind"], STEPS)
    expected = run_world(resume, ONE, str(runs["saved"] / "one"), *arguments)[0]
    for ranks in run_layouts(resume, chosen, str(runs["saved"] / "one"), *arguments):
        assert ranks[0] == pytest.approx(expected, rel=5e-5, abs=5e-6)
    others = sorted(str(path) for path in runs["saved"].iterdir() if path.name not in ("one", "replicated"))
    for found in run_world(resume_each, ONE, others, *arguments)[0]:
        assert found == pytest.approx(expected, rel=5e-5, abs=5e-6)


def test_replicated_optimizer_state_is_not_taken_for_a_sharded_one(runs: dict[str, Any]) -> None:
    arguments = (str(runs["saved"] / "replicated"), runs["preset"], runs["kind"], STEPS)
    with pytest.raises(AssertionError, match=r"Set parallel\.distributed_optimizer = false"):
        run_world(resume, ONE, *arguments)


@pytest.mark.slow
def test_virtual_stages_and_split_experts_equal_one_process(start: Path, tmp_path: Path) -> None:
    """Virtual pipelining (four layers, two stages, two chunks each) and experts split over tensors."""
    run_world(save_start, ONE, str(tmp_path / "start"), "tiny-dense")
    for preset, kind, layout, root in (
        ("tiny-dense", "grpo", ParallelConfig(pipeline=2, virtual_pipeline=2, data=1), tmp_path / "start"),
        ("tiny-moe", "grpo", ParallelConfig(expert_tensor=2, data=2), start / "tiny-moe"),
    ):
        one = run_world(train, ONE, str(root), preset, kind, 2, str(tmp_path / "one"))[0]
        two = run_world(train, layout, str(root), preset, kind, 2, str(tmp_path / "two"))[0]
        for (loss, norm), (loss_one, norm_one) in zip(two, one, strict=True):
            assert loss == pytest.approx(loss_one, rel=1e-5, abs=1e-6), layout
            assert norm == pytest.approx(norm_one, rel=1e-5), layout
        tokens, _ = run_world(generate, ONE, str(root), preset)[0]
        for found, gap in run_world(generate, layout, str(root), preset):
            assert found == tokens, layout
            assert gap < 1e-5, layout


def test_tokens_equal_one_process(start: Path) -> None:
    for preset, layouts in (("tiny-moe", TWO), ("tiny-dense", DENSE)):
        tokens, gap = run_world(generate, ONE, str(start / preset), preset)[0]
        assert gap < 1e-5
        chosen = [layout for name, layout in layouts.items() if "optimizer" not in name]
        for ranks in run_layouts(generate, chosen, str(start / preset), preset):
            for found, other_gap in ranks:
                assert found == tokens
                assert other_gap < 1e-5
