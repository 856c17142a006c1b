"""Layouts against one process: the same samples through the real trainer, step by step, as a table.

Rows are layouts; each says how far its losses, gradient norms and parameters are from those of one process after
STEPS optimizer steps from the same checkpoint. `tests/dist/test_layouts.py` holds the table to its bounds and
`benchmarks/layouts.py` prints it and writes docs/parallelism.md.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.model import ModelConfig, ParallelConfig
from tests.dist.harness import run_layouts, run_world
from tests.dist.workload import save_start, train
from tests.e2e.recipes import tensors

STEPS = 3
ONE = ParallelConfig(data=1)
# Four layers, so that there are stages and virtual stages to cut; one dense, three with experts, one MTP layer.
MODELS = {
    "tiny-moe": ModelConfig(preset="tiny-moe", override={"num_hidden_layers": 4, "first_k_dense_replace": 1}),
    "tiny-dense": ModelConfig(preset="tiny-dense"),
}
OBJECTIVES = ("grpo", "gspo", "sft", "reward")
BOUNDS = {"loss": 2e-6, "grad_norm": 5e-6, "param_max": 2e-4, "param_mean": 1e-6}
REWARD_LOSS = 5e-6  # the mean over six pairs, each the difference of two values of about 1, not over hundreds of tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """One row: a layout, and what of the model's settings goes with it."""

    name: str
    parallel: ParallelConfig
    model: dict[str, Any] = field(default_factory=dict)  # keys of `[model]`

    def settings(self, preset: str) -> ModelConfig:
        """`[model]` of this row."""
        return ModelConfig.model_validate({**MODELS[preset].model_dump(exclude_unset=True), **self.model})


def _layout(name: str, model: dict[str, Any] | None = None, data: int = 1, **parallel: Any) -> Layout:
    return Layout(name, ParallelConfig(data=data, **parallel), model or {})


_UNEVEN = {"megatron": {"num_layers_in_first_pipeline_stage": 1}}
_FULL = {"recompute": "full"}
_SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "mla_up_proj", "moe"]}
_LAYOUT_STRING = {"megatron": {"pipeline_model_parallel_layout": "Et|tttmL"}}

# Under expert parallelism replicas hold different experts, so those layouts have data > 1 or tensor > 1.
MOE = (
    _layout("TP2", tensor=2),
    _layout("PP2", pipeline=2),
    _layout("PP2, stages of 1 and 3 layers", _UNEVEN, pipeline=2),
    _layout('PP2, layout "Et|tttmL"', _LAYOUT_STRING, pipeline=2),
    _layout("PP2 x VPP2", pipeline=2, virtual_pipeline=2),
    _layout("CP2", context=2),
    _layout("DP2", data=2),
    _layout("DP2, replicated optimizer", data=2, distributed_optimizer=False),
    _layout("DP2, overlapped reduction", data=2, overlap_grad_reduce=True),
    _layout("EP2", data=2, expert=2),
    _layout("EP2, allgather", data=2, expert=2, dispatcher="allgather"),
    _layout("TP2 x EP2", tensor=2, expert=2),
    _layout("TP2 x ETP2", tensor=2, expert_tensor=2),
    _layout("CP2 x EP2", context=2, expert=2),
    _layout("EP2, full recompute", _FULL, data=2, expert=2),
    _layout("TP2, selective recompute", _SELECTIVE, tensor=2),
    _layout("PP4", pipeline=4),
    _layout("CP4", context=4),
    _layout("EP4", data=4, expert=4),
    _layout("TP2 x PP2", tensor=2, pipeline=2),
    _layout("TP2 x CP2", tensor=2, context=2),
    _layout("PP2 x CP2", pipeline=2, context=2),
    _layout("PP2 x CP2, allgather", pipeline=2, context=2, dispatcher="allgather"),
    _layout("PP2 x EP2, overlapped reduction", pipeline=2, data=2, expert=2, overlap_grad_reduce=True),
    _layout("TP2 x DP2 x EP4", tensor=2, data=2, expert=4),
    _layout("TP2 x DP2 x EP2 x ETP2", tensor=2, data=2, expert=2, expert_tensor=2),
    _layout("PP2 x VPP2 x EP2", pipeline=2, virtual_pipeline=2, data=2, expert=2),
    _layout("TP2 x CP2 x EP4, allgather", tensor=2, context=2, expert=4, dispatcher="allgather"),
    _layout("TP2 x PP2 x EP2", tensor=2, pipeline=2, data=2, expert=2),
    _layout("TP2 x PP2 x CP2", tensor=2, pipeline=2, context=2),
    _layout("PP2 x CP2 x DP2 x EP4", pipeline=2, context=2, data=2, expert=4),
    _layout("TP2 x PP2 x VPP2 x EP4", tensor=2, pipeline=2, virtual_pipeline=2, data=2, expert=4),
    _layout("EP8", data=8, expert=8),
)
DENSE = (
    _layout("TP2", tensor=2),
    _layout("TP2 without sequence parallelism", tensor=2, sequence=False),
    _layout("PP2 x VPP2", pipeline=2, virtual_pipeline=2),
    _layout("CP2", context=2),
    _layout("DP2", data=2),
    _layout("PP4", pipeline=4),
    _layout("TP2 without sequence parallelism x CP2", tensor=2, sequence=False, context=2),
    _layout("TP2 x DP2, full recompute", _FULL, tensor=2, data=2),
    _layout("TP2 x PP2 x CP2", tensor=2, pipeline=2, context=2),
)
LAYOUTS = {"tiny-moe": MOE, "tiny-dense": DENSE}


def bound_of(column: str, objective: str) -> float:
    """The largest number that a cell of the table may hold."""
    return REWARD_LOSS if (column, objective) == ("loss", "reward") else BOUNDS[column]


@dataclass(frozen=True, slots=True)
class Row:
    """How far a layout is from one process, at most over the steps (parameters: after the last)."""

    model: str
    objective: str
    layout: str
    processes: int
    loss: float  # the mean over tokens (sft) or pairs (reward), or the GRPO loss
    grad_norm: float  # relative to one process's
    param_max: float
    param_mean: float

    @property
    def beyond(self) -> list[str]:
        """Columns that are outside of BOUNDS."""
        return [name for name in BOUNDS if getattr(self, name) > bound_of(name, self.objective)]


def measure(
    presets: Iterable[str],
    scratch: Path,
    layouts: Callable[[Layout], bool] = lambda _: True,
    progress: Callable[[str], None] = lambda _: None,
    objectives: Sequence[str] = OBJECTIVES,
) -> list[Row]:
    """Train every chosen layout and compare. `scratch` holds checkpoints, and is emptied behind each comparison."""
    rows: list[Row] = []
    for preset in presets:
        root = scratch / preset
        chosen = [layout for layout in LAYOUTS[preset] if layouts(layout)]
        for kind in objectives:
            run_world(save_start, ONE, str(root / "start" / kind), MODELS[preset], kind)
        progress(f"{preset}: one process")
        one = _train(preset, [Layout("one", ONE)], root, objectives)[0]
        reference = {kind: weights(root / "one" / kind) for kind in objectives}
        by_size = sorted(chosen, key=lambda layout: layout.parallel.world_size)
        for size, group in itertools.groupby(by_size, key=lambda layout: layout.parallel.world_size):
            for batch in _batched(group, 8):  # a world's processes gather threads: a few layouts, then new ones
                progress(f"{preset}: {size} processes, {', '.join(layout.name for layout in batch)}")
                for layout, histories in zip(batch, _train(preset, batch, root, objectives), strict=True):
                    for kind, history in histories.items():
                        folder = root / layout.name / kind
                        rows.append(
                            _compare(preset, kind, layout, history, one[kind], weights(folder), reference[kind])
                        )
                    shutil.rmtree(root / layout.name)
    return rows


def _batched(items: Iterable[Layout], size: int) -> Iterable[tuple[Layout, ...]]:
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _train(preset: str, layouts: Sequence[Layout], root: Path, objectives: Sequence[str]) -> list[dict[str, list[tuple[float, float]]]]:
    """Histories of each layout by objective; its ranks must agree. One world of processes runs them all."""
    jobs = [(layout.settings(preset), str(root / layout.name)) for layout in layouts]
    ranks = run_layouts(
        train_all,
        [layout.parallel for layout in layouts],
        str(root / "start"),
        objectives,
        each=jobs,
        timeout=580,
    )
    for layout, found in zip(layouts, ranks, strict=True):
        assert all(other == found[0] for other in found[1:]), f"{layout.name}: ranks disagree about the metrics"
    return [found[0] for found in ranks]


def train_all(
    world: Any, model: ModelConfig, saved: str, root: str, objectives: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """STEPS of each objective on this rank; the weights after the last are saved."""
    return {kind: train(world, f"{root}/{kind}", model, kind, STEPS, f"{saved}/{kind}") for kind in objectives}


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The model's whole tensors of a step's checkpoint."""
    found = tensors(folder / f"step-{step:08d}")
    return {k: v.double() for k, v in found.items() if not k.startswith(("optimizer", "rng"))}


def differences(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(largest, mean) absolute difference of all parameters."""
    assert found.keys() == reference.keys(), "other parameters than one process"
    values = torch.cat([(found[name] - reference[name]).abs().flatten() for name in reference])
    return float(values.max()), float(values.mean())


def _compare(
    preset: str,
    kind: str,
    layout: Layout,
    history: list[tuple[float, float]],
    one: list[tuple[float, float]],
    found: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
) -> Row:
    largest, mean = differences(found, reference)
    return Row(
        model=preset,
        objective=kind,
        layout=layout.name,
        processes=layout.parallel.world_size,
        loss=max(abs(a[0] - b[0]) for a, b in zip(history, one, strict=True)),
        grad_norm=max(abs(a[1] - b[1]) / b[1] for a, b in zip(history, one, strict=True)),
        param_max=largest,
        param_mean=mean,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table, a cell outside of its bound in bold."""
    lines = ["| model | objective | layout | processes | loss | gradient norm | parameters, max | parameters, mean |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            f"**{getattr(row, name):.1e}**" if name in row.beyond else f"{getattr(row, name):.1e}" for name in BOUNDS
        ]
        lines.append(f"| {row.model} | {row.objective} | {row.layout} | {row.processes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document(rows: Sequence[Row], machine: str, commit: str) -> str:
    """docs/parallelism.md."""
    return TEXT.format(
        layouts=len({(row.model, row.layout) for row in rows}),
        steps=STEPS,
        machine=machine,
        commit=commit,
        bounds=", ".join(f"{name} {bound:.0e}" for name, bound in BOUNDS.items()),
        reward=REWARD_LOSS,
        bf16_loss=BF16["loss"],
        bf16_norm=BF16["grad_norm"],
        bf16_mean=BF16["param_mean"],
        table=markdown(rows),
    )


BF16 = {"loss": 2e-2, "grad_norm": 5e-2, "param_mean": 3e-4}
"""Bounds of bf16 layouts against one bf16 process: 8 bits of mantissa round an activation by up to 2^-9 of itself."""

TEXT = """\
# Parallelism

Written by `python benchmarks/layouts.py --write`; the numbers below are of commit {commit} on
{machine}.
`pytest -m slow tests/dist` trains the same table and holds every cell to its bound; the default tests do so for one
layout of each kind.

## Axes

| axis | key of `[parallel]` | what it divides | remarks |
|---|---|---|---|
| tensor (TP) | `tensor` | heads, feed-forward widths, vocabulary | with sequence parallelism unless `sequence = false`; experts and multi-head latent attention need it |
| pipeline (PP) | `pipeline` | layers | uneven stages: `[model.megatron] num_layers_in_first_pipeline_stage` or `pipeline_model_parallel_layout` |
| virtual pipeline (VPP) | `virtual_pipeline` | a stage's layers, into chunks | `pipeline` above 1 |
| context (CP) | `context` | the tokens of every sequence, zig-zag | in rollouts each context rank samples on its own |
| expert (EP) | `expert` | routed experts | spans data-, context- and tensor-parallel ranks |
| expert tensor (ETP) | `expert_tensor` | each expert's width | |
| data (DP) | `data` | samples | optimizer state is shared out unless `distributed_optimizer = false` |
| dispatcher | `dispatcher` | - | `alltoall`; `allgather` (rows as long as the longest); `flex` (DeepEP, HybridEP: GPUs only) |

Rows are packed: sequences of any length share a row, each attends to itself alone, positions restart, and padding
(what aligns rows and context slices) is kept out of the router's statistics and of the expert bias.

What Megatron-Core 0.16.1 cannot do is refused with the reason before anything is trained: `flex` and grouped GEMM
without a GPU, experts without sequence parallelism under TP, the router's auxiliary and z losses and capacity limits
(0.16.1 scales them wrongly under TP and CP with per-token loss, and lets padding compete).

## Every layout against one process

{layouts} layouts of up to 8 processes, float32, gloo on a CPU. The models are `tiny-moe` with four layers (one dense,
three with experts) and its multi-token-prediction layer, and `tiny-dense`. From one checkpoint each layout takes
{steps} Adam steps on ragged, packed samples, with clipping active; the sequences of a step differ from those of the next.
`grpo`: the clipped policy loss with KL, importance correction and the detached multi-token-prediction loss; `gspo`: the
same with the ratio of whole sequences, a mask of whole sequences and a veto, in padded rows; `sft`: next-token loss on
some of the tokens with the joint multi-token-prediction loss; `reward`: the pairwise loss of a reward model.

Columns: the largest difference from one process over the steps, of the loss and (relative) of the gradient norm; then
of all parameters after the last step, the largest and the mean one. The expert bias is updated in all runs. Bounds:
{bounds};
{reward:.0e} for the loss of `reward`, a mean over six pairs of values rather than over hundreds of tokens.

{table}

Differences come from the order of float32 sums: split matrix products (TP, ETP), attention over gathered keys (CP),
sums over replicas (DP). Adam divides a gradient by its own size, so where a gradient is nothing but rounding the
parameter moves by up to a learning rate (5e-4) either way: that is the largest difference, and the mean shows how rare
it is. PP moves no sum, and differs least.

## bf16

With bf16 parameters (float32 master weights and gradient sums) TP2, PP2, CP2, EP2 and TP2 x PP2 x EP2 agree with one
bf16 process within {bf16_loss:.0e} in the `grpo` loss, {bf16_norm:.0%} in the gradient norm and {bf16_mean:.0e} in the
mean parameter over three steps (a test of the slow tier; the largest seen are 1.1e-2, 2.6% and 1.3e-4): an activation
is rounded to 8 bits, and splitting a product changes which way. PP2, which splits none, agrees to 1e-7.

## Checkpoints

A checkpoint of any layout loads under any other, with its optimizer state: TP2 x PP2 x EP2 -> one process and EP4 are
tests of the default tier, one process -> each layout and back too. Only `distributed_optimizer = true` and `false` have
different formats; loading one as the other is refused with the reason.
"""
