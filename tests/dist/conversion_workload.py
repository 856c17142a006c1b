"""What the worlds of the conversion tests do: load a model in every way, score samples, save in every format.

`prove` runs on every rank of a layout. The test compares what it returns and exports what it saved.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.model import ModelConfig, Precision
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.start import load_start
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Sample

Held = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Folders:
    """hf: the model. te, local: its imports under either spec. out: where `prove` saves."""

    hf: Path
    te: Path
    local: Path
    out: Path


@dataclass(frozen=True)
class Proof:
    """What one rank found. unequal: ways of loading -> parameters that differ from those of the first way."""

    parameters: int
    unequal: dict[str, list[str]]
    unread: tuple[set[str], set[str]]  # keys that Megatron missed in an import, and that it did not ask for
    log_probs: list[list[float]]


def samples(vocab: int) -> list[Sample]:
    """Five ragged sequences; every token but the first is scored."""
    draw = random.Random(3)
    lengths = [draw.randint(20, 90) for _ in range(5)]
    return [Sample(token_ids=[draw.randrange(vocab) for _ in range(n)], prompt_length=1) for n in lengths]


def prove(world: World, folders: Folders, precision: Precision, megatron: dict[str, Any], legacy: bool) -> Proof:
    """Load the Hugging Face folder and its imports through the start of a stage, and the import once more through
    Megatron's own strict load; then save a training checkpoint, and Megatron-LM's older format if `legacy`.
    """
    model = ModelConfig(config=folders.hf, precision=precision, megatron=megatron)
    arch = architecture(model, 0)
    trainer = Trainer(arch, model, world, OptimizerConfig(lr=1e-3), steps=1)
    found: dict[str, Held] = {}
    for way, folder in (("hf", folders.hf), ("te", folders.te), ("local", folders.local)):
        _spoil(trainer)
        load_start(folder, trainer)
        found[way] = _held(trainer)
    _spoil(trainer)
    unread = _load_by_megatron(folders.local, trainer)
    found["megatron"] = _held(trainer)
    first = found.pop("hf")
    unequal = {
        way: [name for name in first.keys() | held.keys() if not _same(first.get(name), held.get(name))]
        for way, held in found.items()
    }
    scored = compute_log_probs(trainer, samples(arch["vocab_size"]), Batcher(world, 200, pad_id=0), temperature=1.0)
    checkpoint_io.save(folders.out / "training", trainer, {}, None, keep=1)
    if legacy:
        _save_legacy(folders.out / "legacy", trainer)
    dist.barrier()
    return Proof(len(first), unequal, unread, [sample.log_probs for sample in scored])


def _spoil(trainer: Trainer) -> None:
    """NaN everywhere, so that what is not loaded is seen."""
    with torch.no_grad():
        for tensor in _tensors(trainer).values():
            tensor.fill_(torch.nan)


def _held(trainer: Trainer) -> Held:
    return {name: tensor.detach().clone() for name, tensor in _tensors(trainer).items()}


def _tensors(trainer: Trainer) -> Held:
    """Parameters and the router's biases of all chunks of this rank; its counters start at 0 and are not saved."""
    return {
        f"{i}.{name}": value.data
        for i, model in enumerate(trainer.models)
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and not name.endswith("local_tokens_per_expert")
    }


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def _load_by_megatron(folder: Path, trainer: Trainer) -> tuple[set[str], set[str]]:
    metadata = checkpoint_io.sharding_metadata(trainer.world)
    state = {str(i): model.sharded_state_dict(metadata=metadata) for i, model in enumerate(trainer.models)}
    loaded, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    for i, model in enumerate(trainer.models):
        model.load_state_dict(loaded[str(i)], strict=True)
    return missing, unexpected


def _save_legacy(root: Path, trainer: Trainer) -> None:
    """What Megatron-LM's `--ckpt-format torch` saves: every rank's state dict, in the folder of its ranks."""
    layout = trainer.world.layout
    folder = f"mp_rank_{trainer.world.tensor_rank:02d}"
    if layout.pipeline > 1:
        folder += f"_{trainer.world.pipeline_rank:03d}"
    if layout.expert > 1:
        folder += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    states: list[dict[str, Any]] = [model.state_dict_for_save_checkpoint() for model in trainer.models]
    names = ["model"] if len(states) == 1 else [f"model{i}" for i in range(len(states))]
    args = argparse.Namespace(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        untie_embeddings_and_output_weights=not trainer.arch.get("tie_word_embeddings"),
    )
    saved = {**dict(zip(names, states, strict=True)), "args": args, "iteration": 12, "checkpoint_version": 3.0}
    path = root / "iter_0000012" / folder
    if trainer.world.context_rank == 0 and (trainer.world.data_rank == 0 or layout.expert > 1):
        path.mkdir(parents=True, exist_ok=True)
        torch.save(saved, path / "model_optim_rng.pt")
        (root / "latest_checkpointed_iteration.txt").write_text("12")
