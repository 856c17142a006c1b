"""What the worlds of the layout tests compute: fixed samples through the real trainer and engine.

Everything starts from one checkpoint, because weights drawn at random depend on the layout.
"""

from __future__ import annotations

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
from megatron_r1.parallel.world import World
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective, Objective, PolicyObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Prompt, Sample

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.01, clip_grad=0.3)
LOSS = LossConfig(clip_low=0.2)


def samples(number: int = 12, seed: int = 0) -> list[Sample]:
    """Ragged samples with advantages and old and reference log-probs."""
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
                old_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
                reference_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
                rollout_log_probs=[-4.6 + draw.gauss(0, 0.1) for _ in range(response)],
            )
        )
    return made


def make_trainer(world: World, preset: str, mtp: bool) -> Trainer:
    model = ModelConfig(preset=preset)
    arch = architecture(model, TOKENIZER.vocab_size)
    # The bias update counts routed tokens, padding included, and padding differs between layouts.
    return Trainer(arch, model, world, OPTIMIZER, steps=10, train_mtp=mtp, expert_bias_frozen=True)


def save_start(world: World, root: str, preset: str) -> None:
    """Fresh weights, expert biases that matter, saved as step 0."""
    trainer = make_trainer(world, preset, mtp=True)
    draw = torch.Generator().manual_seed(5)
    for model in trainer.models:
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.05 * torch.rand(buffer.shape, generator=draw))
    checkpoint_io.save(Path(root), trainer, {}, None, keep=1)


def objective_of(kind: str, batch: list[Sample], world: World) -> Objective:
    if kind == "lm":
        return LanguageModelObjective(mtp_loss=0.1)
    return PolicyObjective(LOSS, CorrectionConfig(), (), count(batch), 64, 1.0, world)


def micro_batches(batch: list[Sample], trainer: Trainer, packed: bool = True) -> list[Any]:
    return Batcher(trainer.world, 160, pad_id=0, packed=packed)(batch, trainer.mtp_depths)


def train(world: World, root: str, preset: str, kind: str, steps: int, saved: str) -> list[tuple[float, float]]:
    """(loss sum, gradient norm) of each step; the weights after the last are saved under `saved`/<layout>."""
    trainer = make_trainer(world, preset, mtp=kind == "lm")
    checkpoint_io.load_weights(folders.folder(Path(root), 0), trainer)
    history = []
    for step in range(steps):
        batch = samples(seed=step)
        result = trainer.train_step(micro_batches(batch, trainer), objective_of(kind, batch, world))
        history.append((result.sums["loss" if kind == "grpo" else "nll"], result.grad_norm))
    checkpoint_io.save(Path(saved) / layout_name(world), trainer, {}, None, keep=1)
    return history


def resume(world: World, root: str, preset: str, kind: str, step: int) -> tuple[float, float]:
    """Load a checkpoint with its optimizer and take the next step."""
    trainer = make_trainer(world, preset, mtp=kind == "lm")
    checkpoint_io.load(folders.folder(Path(root), step), trainer, None)
    batch = samples(seed=step)
    result = trainer.train_step(micro_batches(batch, trainer), objective_of(kind, batch, world))
    return result.sums["loss" if kind == "grpo" else "nll"], result.grad_norm


def resume_each(world: World, roots: list[str], preset: str, kind: str, step: int) -> list[tuple[float, float]]:
    """`resume` for several checkpoints in one process."""
    return [resume(world, root, preset, kind, step) for root in roots]


def generate(world: World, root: str, preset: str) -> tuple[list[list[list[int]]], float]:
    """Tokens that every prompt's completions get, and how far decoding is from a full forward in log-prob."""
    trainer = make_trainer(world, preset, mtp=False)
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


def layout_name(world: World) -> str:
    layout = world.layout
    if not layout.distributed_optimizer:
        return "replicated"
    parts = dict(
        tp=layout.tensor, pp=layout.pipeline, vpp=layout.virtual_pipeline, ep=layout.expert, etp=layout.etp,
        dp=world.data_size,
    )
    return "_".join(f"{k}{v}" for k, v in parts.items() if v > 1) or "one"
