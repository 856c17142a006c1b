"""Every layout gives the one-process run's losses, gradient norms and parameters, through the real Megatron-Core."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_r1.config.model import ParallelConfig
from tests.dist import layout_table
from tests.dist.harness import run_layouts, run_world
from tests.dist.layout_table import BF16, BOUNDS, DENSE, LAYOUTS, MODELS, MOE, ONE, STEPS, Row, bound_of, measure
from tests.dist.workload import generate, resume, resume_each, save_start, train

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
# One of each kind of parallelism for every run of the tests; the whole table is the slow tier's.
QUICK = {"TP2", "PP2 x VPP2", "CP2", "EP2, allgather", "TP2 x EP2", "TP2 without sequence parallelism"}
EP2 = ParallelConfig(expert=2, data=2)
REPLICATED = ParallelConfig(data=2, distributed_optimizer=False)
MODEL = MODELS["tiny-moe"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    for preset, model in MODELS.items():
        run_world(save_start, ONE, str(root / preset), model)
    return root


def assert_within_bounds(rows: list[Row]) -> None:
    assert [(row, row.beyond) for row in rows if row.beyond] == []


def test_layouts_equal_one_process(tmp_path: Path) -> None:
    rows = measure(MODELS, tmp_path, lambda layout: layout.name in QUICK, objectives=("grpo", "reward"))
    assert {row.layout for row in rows} == QUICK
    assert_within_bounds(rows)
    # The numbers are of something: the layouts do not run the very same arithmetic.
    assert all(max(row.loss, row.param_max) > 0 for row in rows)


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path) -> None:
    rows = measure(MODELS, tmp_path)
    assert len({(row.model, row.layout) for row in rows}) == len(MOE) + len(DENSE) >= 25
    assert max(row.processes for row in rows) == 8
    assert_within_bounds(rows)


def test_the_document_holds_the_table_of_these_layouts() -> None:
    """docs/parallelism.md is written by benchmarks/layouts.py --write; its cells obey the same bounds."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.findall(r"^\| (tiny-\S+) \| (\S+) \| (.+?) \| \d+ \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.M)
    expected = {
        (preset, kind, layout.name)
        for preset, layouts in LAYOUTS.items()
        for kind in layout_table.OBJECTIVES
        for layout in layouts
    }
    assert {row[:3] for row in found} == expected
    for row in found:
        for cell, column in zip(row[3:], BOUNDS, strict=True):
            assert float(cell) <= bound_of(column, row[1]), row


def test_a_checkpoint_of_three_axes_goes_on_under_others(start: Path, tmp_path: Path) -> None:
    """Saved under TP2 x PP2 x EP2 with its optimizer, loaded by one process and under EP4."""
    three = ParallelConfig(tensor=2, pipeline=2, expert=2, data=1)
    root = str(start / "tiny-moe")
    run_world(train, three, root, MODEL, "grpo", STEPS, str(tmp_path / "saved"))
    whole = run_world(train, three, root, MODEL, "grpo", STEPS + 1, str(tmp_path / "whole"))[0]
    arguments = (str(tmp_path / "saved"), MODEL, "grpo", STEPS)
    for layout in (ONE, ParallelConfig(expert=4, data=4)):
        for loss, norm in run_world(resume, layout, *arguments):
            assert loss == pytest.approx(whole[-1][0], abs=2e-6), layout
            assert norm == pytest.approx(whole[-1][1], rel=2e-5), layout


@pytest.mark.slow
def test_optimizer_state_loads_under_another_layout(start: Path, tmp_path: Path) -> None:
    """From one process to other layouts, and from those back to one process."""
    root = str(start / "tiny-moe")
    layouts = [ParallelConfig(pipeline=2, data=1), ParallelConfig(context=2, data=1), EP2]
    saved = [str(tmp_path / str(i)) for i in range(len(layouts))]
    run_world(train, ONE, root, MODEL, "grpo", STEPS, str(tmp_path / "one"))
    for layout, folder in zip(layouts, saved, strict=True):
        run_world(train, layout, root, MODEL, "grpo", STEPS, folder)
    expected = run_world(resume, ONE, str(tmp_path / "one"), MODEL, "grpo", STEPS)[0]
    for ranks in run_layouts(resume, layouts, str(tmp_path / "one"), MODEL, "grpo", STEPS):
        assert ranks[0] == pytest.approx(expected, rel=5e-5, abs=5e-6)
    for found in run_world(resume_each, ONE, saved, MODEL, "grpo", STEPS)[0]:
        assert found == pytest.approx(expected, rel=5e-5, abs=5e-6)


def test_replicated_optimizer_state_is_not_taken_for_a_sharded_one(start: Path, tmp_path: Path) -> None:
    run_world(train, REPLICATED, str(start / "tiny-dense"), MODELS["tiny-dense"], "grpo", 1, str(tmp_path))
    with pytest.raises(AssertionError, match=r"Set parallel\.distributed_optimizer = false"):
        run_world(resume, ONE, str(tmp_path), MODELS["tiny-dense"], "grpo", 1)


GENERATING = {
    "tiny-moe": [
        ParallelConfig(tensor=2, data=1),
        ParallelConfig(pipeline=2, data=1),
        ParallelConfig(context=2, data=1),
        EP2,
        EP2.model_copy(update={"dispatcher": "allgather"}),
        ParallelConfig(expert_tensor=2, data=2),
    ],
    "tiny-dense": [
        ParallelConfig(tensor=2, sequence=False, data=1),
        ParallelConfig(pipeline=2, virtual_pipeline=2, data=1),
        ParallelConfig(context=2, data=1),
    ],
}


@pytest.mark.parametrize("preset", GENERATING)
def test_tokens_equal_one_process(preset: str, start: Path) -> None:
    arguments = (str(start / preset), MODELS[preset])
    tokens, gap = run_world(generate, ONE, *arguments)[0]
    assert gap < 1e-5
    for layout, ranks in zip(
        GENERATING[preset], run_layouts(generate, GENERATING[preset], *arguments), strict=True
    ):
        for found, other_gap in ranks:
            assert found == tokens, layout
            assert other_gap < 1e-5, layout


@pytest.mark.slow
def test_tokens_of_combined_layouts_equal_one_process(start: Path) -> None:
    arguments = (str(start / "tiny-moe"), MODEL)
    tokens, _ = run_world(generate, ONE, *arguments)[0]
    layouts = [
        ParallelConfig(tensor=2, context=2, data=1),
        ParallelConfig(pipeline=2, context=2, data=1),
        ParallelConfig(context=2, expert=4, data=2),
        ParallelConfig(tensor=2, context=2, expert=4, data=1, dispatcher="allgather"),
    ]
    for layout, ranks in zip(layouts, run_layouts(generate, layouts, *arguments, timeout=400), strict=True):
        for found, gap in ranks:
            assert found == tokens, layout
            assert gap < 1e-5, layout


@pytest.mark.slow
def test_bf16_layouts_equal_one_process_within_rounding(tmp_path: Path) -> None:
    bf16 = MODEL.model_copy(update={"precision": "bf16"})
    run_world(save_start, ONE, str(tmp_path / "start"), bf16)
    arguments = (str(tmp_path / "start"), bf16, "grpo", STEPS)
    one = run_world(train, ONE, *arguments, str(tmp_path / "one"))[0]
    reference = layout_table.weights(tmp_path / "one")
    two = [ParallelConfig(**{axis: 2}, data=1) for axis in ("tensor", "pipeline", "context")]
    four = ParallelConfig(tensor=2, pipeline=2, expert=2, data=1)
    for number, layout in enumerate([*two, EP2, four]):
        history = run_world(train, layout, *arguments, str(tmp_path / str(number)))[0]
        for (loss, norm), (loss_one, norm_one) in zip(history, one, strict=True):
            assert abs(loss - loss_one) < BF16["loss"], layout
            assert abs(norm - norm_one) < BF16["grad_norm"] * norm_one, layout
        _, mean = layout_table.differences(layout_table.weights(tmp_path / str(number)), reference)
        assert mean < BF16["param_mean"], layout
