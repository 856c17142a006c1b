"""What the worlds of the reward-model tests compute: fixed pairs, or labelled answers, through the real trainer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.reward_objective import PointwiseObjective, RewardObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Sample
from tests.dist.workload import OPTIMIZER, TOKENIZER

PAIRS = 7  # odd, so that replicas have different numbers of them
STEPS = 3
PRESETS = ("tiny-moe", "tiny-dense")

History = list[tuple[float, float, float]]
"""(mean loss, accuracy, gradient norm) of each step."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a layout does; folders are below the test's root."""

    what: str  # "train": STEPS from the common start; "resume": one more after them; "load": see `from_language_model`
    preset: str = "tiny-moe"
    saved: str = ""
    packed: bool = True
    pointwise: bool = False  # the same sequences, each a labelled answer of its own


def pairs(seed: int) -> list[Sample]:
    """Chosen, rejected, chosen, ... of ragged lengths, from 3 to 49 tokens."""
    draw = random.Random(seed)
    made = []
    for _ in range(PAIRS):
        prompt = [draw.randint(2, TOKENIZER.vocab_size - 1) for _ in range(draw.randint(2, 9))]
        for _ in range(2):
            answer = [draw.randint(2, TOKENIZER.vocab_size - 1) for _ in range(draw.randint(1, 40))]
            made.append(Sample(token_ids=[*prompt, *answer], prompt_length=len(prompt)))
    return made


def labels(batch: list[Sample]) -> list[bool]:
    """By the last token, so that no two neighbours need be of one pair."""
    return [sample.token_ids[-1] % 3 == 0 for sample in batch]


def objective_of(batch: list[Sample], world: World, pointwise: bool = False) -> RewardObjective | PointwiseObjective:
    tokens = sum(len(sample.token_ids) for sample in batch)
    return PointwiseObjective(labels(batch), tokens) if pointwise else RewardObjective(PAIRS, tokens, world)


def make_trainer(world: World, preset: str, *, scalar_head: bool = True) -> Trainer:
    """A reward model; without a head a language model, with its multi-token-prediction layers."""
    model = ModelConfig(preset=preset)
    arch = architecture(model, TOKENIZER.vocab_size)
    return Trainer(arch, model, world, OPTIMIZER, 10, train_mtp=not scalar_head, scalar_head=scalar_head)


def one_process(world: World, root: str) -> dict[str, History]:
    """Saves, of each preset, a start with a head that matters and a language model; trains STEPS and one more."""
    found = {}
    for preset in PRESETS:
        trainer = make_trainer(world, preset)
        head = trainer.models[0].scalar_head.weight
        head.data.copy_(0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(5)))
        checkpoint_io.save(Path(root) / preset / "start", trainer, {}, None, keep=1)
        found[preset] = train(world, root, Job("train", preset, "one")) + run(world, Job("resume", preset), root)
        found[f"{preset} pointwise"] = train(world, root, Job("train", preset, "one-pointwise", pointwise=True))
    language_model = make_trainer(world, "tiny-moe", scalar_head=False)
    checkpoint_io.save(Path(root) / "tiny-moe" / "language-model", language_model, {}, None, keep=1)
    return found


def run(world: World, job: Job, root: str) -> History:
    if job.what == "train":
        return train(world, root, job)
    if job.what == "resume":
        trainer = make_trainer(world, job.preset)
        checkpoint_io.load(folders.folder(Path(root) / job.preset / "one", STEPS), trainer, None)
        return [one_step(trainer, STEPS, job)]
    return from_language_model(world, Path(root) / job.preset, job)


def train(world: World, root: str, job: Job) -> History:
    """From the common start; the state after the last step is saved."""
    trainer = make_trainer(world, job.preset)
    checkpoint_io.load_weights(folders.folder(Path(root) / job.preset / "start", 0), trainer)
    history = [one_step(trainer, seed, job) for seed in range(STEPS)]
    checkpoint_io.save(Path(root) / job.preset / job.saved, trainer, {}, None, keep=1)
    return history


def one_step(trainer: Trainer, seed: int, job: Job) -> tuple[float, float, float]:
    batch = pairs(seed)
    together, items = (1, 2 * PAIRS) if job.pointwise else (2, PAIRS)
    cut = Batcher(trainer.world, 160, pad_id=0, packed=job.packed, together=together)(batch)
    result = trainer.train_step(cut, objective_of(batch, trainer.world, job.pointwise))
    return result.sums["loss"] / items, result.sums["correct"] / items, result.grad_norm


def from_language_model(world: World, folder: Path, job: Job) -> History:
    """A language model's weights loaded and saved again as a reward model's; the values before any step.

    A language model cannot start from that.
    """
    trainer = make_trainer(world, job.preset)
    checkpoint_io.load_weights(folders.folder(folder / "language-model", 0), trainer)
    checkpoint_io.save(folder / job.saved, trainer, {}, None, keep=1)
    batch = pairs(0)
    sums = trainer.measure(Batcher(world, 160, pad_id=0, together=2)(batch), objective_of(batch, world))
    try:
        checkpoint_io.load_weights(
            folders.folder(folder / job.saved, 0), make_trainer(world, job.preset, scalar_head=False)
        )
    except UserError as error:
        assert "holds a reward model" in str(error)
        return [(sums["loss"] / PAIRS, sums["correct"] / PAIRS, 0.0)]
    raise AssertionError("a language model took a reward model's checkpoint")
