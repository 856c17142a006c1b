"""What the worlds of the layout tests compute: fixed samples through the real trainer and engine.

Everything starts from one checkpoint, because weights drawn at random depend on the layout.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch

from megatron_r1.algorithms.weights import count
from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.grpo import CorrectionConfig, LossConfig
from megatron_r1.config.model import ModelConfig, TokenizerConfig
from megatron_r1.config.optim import OptimizerConfig, SamplingConfig
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.presets import architecture
from megatron_r1.model.scalar_head import HEAD
from megatron_r1.parallel.world import World
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective, Objective, PolicyObjective
from megatron_r1.train.reward_objective import RewardObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Prompt, Sample

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
OPTIMIZER = OptimizerConfig(lr=5e-4, weight_decay=0.01, clip_grad=0.3)
LOSS = LossConfig(clip_low=0.2)


def samples(number: int = 12, seed: int = 0, masked: bool = False) -> list[Sample]:
    """Ragged samples with advantages and old and reference log-probs; masked: only some tokens are learned."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        prompt, response = draw.randint(3, 9), draw.randint(2, 40)
        ids = [draw.randint(2, TOKENIZER.vocab_size - 1) for _ in range(prompt + response)]
        made.append(
            Sample(
                token_ids=ids,
                prompt_length=prompt,
                advantage=draw.gauss(0, 1),
                loss_mask=[int(draw.random() < 0.6) for _ in ids] if masked else None,
                old_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
                reference_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
                rollout_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
            )
        )
    return made


def make_trainer(world: World, model: ModelConfig, kind: str = "grpo") -> Trainer:
    """With its multi-token-prediction layers trained and the expert bias updated; kind "reward": a reward model."""
    arch = architecture(model, TOKENIZER.vocab_size)
    return Trainer(arch, model, world, OPTIMIZER, steps=10, scalar_head=kind == "reward")


def save_start(world: World, root: str, model: ModelConfig, kind: str = "grpo") -> None:
    """Fresh weights, expert biases and a scalar head that matter, saved as step 0."""
    trainer = make_trainer(world, model, kind)
    draw = torch.Generator().manual_seed(5)
    for name, tensor in itertools.chain(*((*m.named_buffers(), *m.named_parameters()) for m in trainer.models)):
        if name.endswith("expert_bias"):
            tensor.data.copy_(0.05 * torch.rand(tensor.shape, generator=draw))
        elif name.endswith(HEAD):
            tensor.data.copy_(0.05 * torch.randn(tensor.shape, generator=draw))
    checkpoint_io.save(Path(root), trainer, {}, None, keep=1)


def objective_of(kind: str, batch: list[Sample], world: World) -> Objective:
    if kind == "sft":
        return LanguageModelObjective(mtp_loss=0.1)
    if kind == "reward":
        return RewardObjective(len(batch) // 2, sum(len(sample.token_ids) for sample in batch), world)
    loss, correction = LOSS, CorrectionConfig(method="tis")
    if kind == "gspo":
        loss = LossConfig(clip_low=0.2, ratio="sequence", aggregation="token-mean")
        correction = CorrectionConfig(method="mis", level="geometric", low=0.97, high=1.05, veto=0.5)
    return PolicyObjective(loss, correction, (), count(batch), 64, 1.0, world, mtp_loss=0.1)


def one_step(trainer: Trainer, kind: str, seed: int) -> tuple[float, float]:
    """(mean loss, gradient norm) of an optimizer step on the samples of this seed; "gspo" in padded rows."""
    batch = samples(seed=seed, masked=kind == "sft")
    packed = kind != "gspo" or trainer.world.layout.dispatcher == "allgather"
    together = 2 if kind == "reward" else 1  # a chosen answer and the rejected one behind it
    cut = Batcher(trainer.world, 160, pad_id=0, packed=packed, together=together)(batch, trainer.mtp_depths)
    result = trainer.train_step(cut, objective_of(kind, batch, trainer.world))
    loss = {
        "sft": lambda sums: sums["nll"] / sums["tokens"],
        "grpo": lambda sums: sums["loss"],
        "gspo": lambda sums: sums["loss"],
        "reward": lambda sums: sums["loss"] / (len(batch) // 2),
    }[kind](result.sums)
    return loss, result.grad_norm


def train(world: World, root: str, model: ModelConfig, kind: str, steps: int, saved: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; the weights after the last are saved under `saved`."""
    trainer = make_trainer(world, model, kind)
    checkpoint_io.load_weights(folders.folder(Path(root), 0), trainer)
    history = [one_step(trainer, kind, seed) for seed in range(steps)]
    checkpoint_io.save(Path(saved), trainer, {}, None, keep=1)
    return history


def resume(world: World, root: str, model: ModelConfig, kind: str, step: int) -> tuple[float, float]:
    """Load a checkpoint with its optimizer and take the next step."""
    trainer = make_trainer(world, model)
    checkpoint_io.load(folders.folder(Path(root), step), trainer, None)
    return one_step(trainer, kind, step)


def resume_each(
    world: World, roots: list[str], model: ModelConfig, kind: str, step: int
) -> list[tuple[float, float]]:
    """`resume` for several checkpoints in one process."""
    return [resume(world, root, model, kind, step) for root in roots]


def generate(world: World, root: str, model: ModelConfig) -> tuple[list[list[list[int]]], float]:
    """Tokens that every prompt's completions get, and how far decoding is from a full forward in log-prob."""
    trainer = make_trainer(world, model)
    checkpoint_io.load_weights(folders.folder(Path(root), 0), trainer)
    engine = MegatronEngine(trainer.chunks, world, TOKENIZER, int(trainer.arch["vocab_size"]), 256)
    texts = ["1+2=?", "12-3+4=?", "7=?", "5-6+9-1+2=?"]
    prompts = [
        Prompt(id=t, question=t, text=t, token_ids=TOKENIZER.encode(t), answer=None, verifier="integer") for t in texts
    ]
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.8, batch_size=5)
    mine = prompts[world.replica_rank :: world.replicas]
    shares = world.all_gather_replicas(engine.generate(mine, 3, sampling, seed=7))
    found = [shares[i % world.replicas][i // world.replicas] for i in range(len(prompts))]
    flat = [
        Sample(token_ids=[*p.token_ids, *c.token_ids], prompt_length=len(p.token_ids))
        for p, row in zip(prompts, found, strict=True)
        for c in row
    ]
    again = [s.log_probs for s in compute_log_probs(trainer, flat, Batcher(world, 300, 0), temperature=0.8)]
    kept = [c.log_probs for row in found for c in row]
    gap = max(abs(a - b) for x, y in zip(again, kept, strict=True) for a, b in zip(x, y, strict=True))
    return [[c.token_ids for c in row] for row in found], gap

