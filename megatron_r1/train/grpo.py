"""GRPO (R1-Zero): the whole loop on one screen.

DeepSeek-R1 (arXiv 2501.12948), eq. 1-3: sample G completions of each question from the old policy, reward them by
rules, compare within the group, and climb the clipped, KL-regularised objective in a few random minibatches.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.algorithms.weights import count
from megatron_r1.config.run import GrpoStage
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.prompts import open_prompts
from megatron_r1.model.reference import Reference
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.context import RunContext
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import own_micro_batches
from megatron_r1.train.objectives import PolicyObjective
from megatron_r1.train.phase import Phase, advantages_of, group_samples, minibatch_order, phase_seed, sample_groups
from megatron_r1.train.trainer import StepResult, Trainer
from megatron_r1.types import Sample


def grpo(stage: GrpoStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns the main metrics of its last step. Collective.

    start: checkpoint whose weights it begins with, and its first KL reference; None: fresh weights.
    """
    world, config = context.world, stage.grpo
    trainer = Trainer(
        context.arch,
        context.config.model,
        world,
        stage.optimizer,
        stage.steps,
        train_mtp=False,
        expert_bias_frozen=config.expert_bias == "frozen",
    )
    reference = Reference(trainer.models, step=0) if config.loss.needs_reference else None
    engine = MegatronEngine(
        trainer.chunks, world, context.tokenizer, context.arch["vocab_size"], context.arch["max_position_embeddings"]
    )
    cursor = PromptCursor(
        open_prompts(stage.prompts, context.tokenizer), stage.prompts.shuffle, context.config.seed, context.heldout
    )
    phase: Phase | None = None
    with StageLoop(stage, context, trainer, reference) as loop, VerifierPool(stage.verifier_workers) as pool:
        scorer = Scorer(stage.reward, pool)
        state = loop.resume(start)
        if state is not None:
            cursor.restore(state["cursor"])
            phase = Phase.restore(state["phase"]) if state["phase"] is not None else None
        rollouts = RolloutWriter(loop.folder.path)
        if world.rank == 0:
            rollouts.truncate_after(trainer.step)
        while trainer.step < stage.steps:
            began = time.monotonic()
            if phase is None:
                # 1. sample and score; 2. advantages; 3. old and reference log-probs
                engine.update_weights(trainer.step)
                seed = phase_seed(context.config.seed, trainer.step)
                rollout = sample_groups(stage, cursor, engine, scorer, world, seed, loop.rollout_progress)
                if world.rank == 0:
                    advantages = [advantages_of(group, config.advantage) for group in rollout.groups]
                    rollouts.write(trainer.step, rollout.groups, advantages)
                samples = group_samples(rollout.kept, config.advantage)
                order = minibatch_order(len(samples), config.minibatches, config.epochs, seed)
                seconds = _annotate(samples, len(order), stage, context, trainer, reference)
                metrics = {**rollout.metrics, "time/log_probs": world.largest(seconds)}
                phase = Phase(samples, order, taken=0, metrics=metrics)
            # 4. one optimizer step on the next random minibatch
            minibatch = phase.minibatch()
            result, seconds = _optimize(minibatch, stage, context, trainer)
            loop.check_finite(result, minibatch)
            sampled = phase.metrics if phase.taken == 0 else {}  # once a phase, with its first optimizer step
            loop.log(
                {
                    **sampled,
                    **_policy_metrics(result, seconds, reference is not None),
                    "time/step": time.monotonic() - began,
                }
            )
            phase.taken += 1
            # 5. the reference follows every so many steps
            every = config.loss.reference_every
            if reference is not None and every and trainer.step % every == 0:
                reference.replace(trainer.step)
            if phase.is_spent:
                phase = None
            loop.end_of_step(partial(_loop_state, cursor, phase))
        return loop.closing(
            "reward/mean", "reward/accuracy", "reward/format", "rollout/length", "policy/kl", "policy/entropy"
        )


def _loop_state(cursor: PromptCursor, phase: Phase | None) -> dict[str, Any]:
    return {"cursor": cursor.state(), "phase": None if phase is None else phase.state()}


def _annotate(
    samples: list[Sample],
    steps: int,
    stage: GrpoStage,
    context: RunContext,
    trainer: Trainer,
    reference: Reference | None,
) -> float:
    """Fill in the old and the reference log-probs; returns the seconds it took.

    A phase of a single optimizer step is on-policy: its old log-probs are the ones of the training forward itself
    (ratio exactly 1), and the pass is left out.
    """
    began = time.monotonic()
    arguments: dict[str, Any] = {
        "temperature": stage.sampling.temperature,
        "max_tokens": stage.micro_batch_tokens,
        "pad_id": context.tokenizer.pad_id,
    }
    if steps > 1:
        for sample, values in zip(samples, compute_log_probs(trainer, samples, **arguments), strict=True):
            sample.old_log_probs = values
    if reference is not None:
        with reference.swapped_in():
            found = compute_log_probs(trainer, samples, **arguments)
        for sample, values in zip(samples, found, strict=True):
            sample.reference_log_probs = values
    return time.monotonic() - began


def _optimize(
    minibatch: list[Sample], stage: GrpoStage, context: RunContext, trainer: Trainer
) -> tuple[StepResult, float]:
    began = time.monotonic()
    world = context.world
    mine = own_micro_batches(minibatch, world, max_tokens=stage.micro_batch_tokens, pad_id=context.tokenizer.pad_id)
    objective = PolicyObjective(
        config=stage.grpo.loss,
        denominators=count(minibatch),  # once, globally, before the first forward
        length_constant=stage.sampling.max_new_tokens,
        temperature=stage.sampling.temperature,
        vocab_size=context.arch["vocab_size"],
        world=world,
    )
    result = trainer.train_step(mine, objective)
    return result, time.monotonic() - began


def _policy_metrics(result: StepResult, seconds: float, has_reference: bool) -> dict[str, float]:
    sums = result.sums
    tokens = max(1.0, sums["tokens"])
    kl = {"policy/kl": sums["kl_k3"] / tokens} if has_reference else {}
    return {
        **kl,
        "loss/total": sums["loss"],
        "policy/entropy": sums["entropy"] / tokens,
        "policy/ratio": sums["ratio"] / tokens,
        "policy/clip_low": sums["clip_low"] / tokens,
        "policy/clip_high": sums["clip_high"] / tokens,
        "policy/dual_clip": sums["dual_clip"] / tokens,
        "policy/engine_gap": sums["mismatch_abs"] / tokens,
        "policy/engine_k3": sums["mismatch_k3"] / tokens,
        "optim/grad_norm": result.grad_norm,
        "optim/lr": result.lr,
        "time/train": seconds,
    }
