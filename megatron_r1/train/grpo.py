"""GRPO (R1-Zero): the whole loop on one screen.

DeepSeek-R1 (arXiv 2501.12948), eq. 1-3: sample G completions of each question from the old policy, reward them by
rules, compare within the group, and climb the clipped, KL-regularised objective in a few random minibatches.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1.algorithms.mismatch import mismatch_metrics
from megatron_r1.algorithms.weights import count
from megatron_r1.config.stages import GrpoStage
from megatron_r1.data.prompt_mix import PromptMix
from megatron_r1.model.reference import Reference
from megatron_r1.model.routing import check_replayable
from megatron_r1.observe.rollouts import RolloutWriter
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.train.annotate import annotate
from megatron_r1.train.context import RunContext
from megatron_r1.train.engines import build_engine
from megatron_r1.train.loop import StageLoop
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.mismatch_watch import MismatchWatch
from megatron_r1.train.objectives import PolicyObjective
from megatron_r1.train.phase import Phase, advantages_of, group_samples, minibatch_order, phase_seed, sample_groups
from megatron_r1.train.reward_models import RewardModels
from megatron_r1.train.reward_watch import RewardWatch
from megatron_r1.train.trainer import StepResult, Trainer
from megatron_r1.types import Sample


def grpo(stage: GrpoStage, context: RunContext, start: Path | None) -> dict[str, float]:
    """Run or resume the stage; returns the main metrics of its last step. Collective.

    start: checkpoint whose weights it begins with, and its first KL reference; None: fresh weights.
    """
    world, config = context.world, stage.grpo
    trainer = Trainer(
        context.arch,
        context.model,
        world,
        stage.optimizer,
        stage.steps,
        train_mtp=config.mtp_loss > 0,
        expert_bias_frozen=config.expert_bias == "frozen",
    )
    reference = Reference(trainer.models, 0, config.loss.reference_memory) if config.loss.needs_reference else None
    batcher = Batcher.of(stage, context)
    if config.routing_replay != "none":
        check_replayable(trainer.config)
    engine = build_engine(trainer, context, record_routing=config.routing_replay == "rollout")
    models = RewardModels.of(stage, context)
    prompts = PromptMix(stage.prompts, context.tokenizer, context.config.seed, context.heldout)
    phase: Phase | None = None
    with StageLoop(stage, context, trainer, reference) as loop, VerifierPool(stage.verifier_workers) as pool:
        scorer = Scorer(stage.reward, pool)
        state = loop.resume(start)
        if state is not None:
            prompts.restore(state["prompts"])
            phase = Phase.restore(state["phase"]) if state["phase"] is not None else None
        rollouts = RolloutWriter(loop.folder.path)
        watch = MismatchWatch(
            stage.name, config.mismatch_limit, loop.folder.path, context.tokenizer, writes=world.rank == 0
        )
        hacking = RewardWatch(stage, loop.folder)
        if world.rank == 0:
            rollouts.truncate_after(trainer.step)
            hacking.resume()
        while trainer.step < stage.steps:
            began = time.monotonic()
            if phase is None:
                # 1. sample and score; 2. advantages; 3. old and reference log-probs
                engine.update_weights(trainer.step)
                seed = phase_seed(context.config.seed, trainer.step)
                rollout = sample_groups(
                    stage, prompts, trainer.step, engine, scorer, world, seed, loop.rollout_progress, models
                )
                if world.rank == 0:
                    advantages = [advantages_of(group, config.advantage) for group in rollout.groups]
                    rollouts.write(trainer.step, rollout.groups, advantages)
                samples = group_samples(rollout.kept, config.advantage)
                order = minibatch_order(len(samples), config.minibatches, config.epochs, seed)
                costs = annotate(samples, order, stage, trainer, batcher, reference)
                phase = Phase(samples, order, taken=0, metrics={**rollout.metrics, **costs})
            # 4. one optimizer step on the next random minibatch
            minibatch = phase.minibatch()
            result, seconds = _optimize(minibatch, stage, trainer, batcher)
            loop.check_finite(result, minibatch)
            metrics = _policy_metrics(result, seconds, reference is not None)
            sampled = hacking.seen(trainer.step, phase.metrics) if phase.taken == 0 else {}  # once a phase, at first
            loop.log({**sampled, **metrics, "time/step": time.monotonic() - began})
            watch.check(trainer.step, metrics, minibatch)
            phase.taken += 1
            # 5. the reference follows every so many steps
            every = config.loss.reference_every
            if reference is not None and every and trainer.step % every == 0:
                reference.replace(trainer.step)
            if phase.is_spent:
                phase = None
            loop.end_of_step(partial(_loop_state, prompts, phase))
        return loop.closing(
            *("reward/mean", "reward/accuracy", "reward/format", "reward/language", "rollout/length"),
            *("policy/kl", "policy/entropy"),
            *(f"reward/model/{name}" for name in hacking.names),
        )


def _loop_state(prompts: PromptMix, phase: Phase | None) -> dict[str, Any]:
    return {"prompts": prompts.state(), "phase": None if phase is None else phase.state()}


def _optimize(
    minibatch: list[Sample], stage: GrpoStage, trainer: Trainer, batcher: Batcher
) -> tuple[StepResult, float]:
    began = time.monotonic()
    objective = PolicyObjective(
        config=stage.grpo.loss,
        correction=stage.grpo.correction,
        limits=stage.grpo.mismatch_limit,
        denominators=count(minibatch),  # once, globally, before the first forward
        length_constant=stage.sampling.max_new_tokens,
        temperature=stage.sampling.temperature,
        world=trainer.world,
        mtp_loss=stage.grpo.mtp_loss,
    )
    result = trainer.train_step(batcher(minibatch, trainer.mtp_depths), objective)
    return result, time.monotonic() - began


def _policy_metrics(result: StepResult, seconds: float, has_reference: bool) -> dict[str, float]:
    sums = result.sums
    tokens = max(1.0, sums["tokens"])
    kl = {"policy/kl": sums["kl_k3"] / tokens} if has_reference else {}
    mtp = {"loss/mtp": sums["mtp_nll"] / sums["mtp_tokens"]} if sums["mtp_tokens"] else {}
    return {
        **kl,
        **mtp,
        **mismatch_metrics(sums, result.maxima),
        **result.routing,
        "loss/total": sums["loss"],
        "policy/entropy": sums["entropy"] / tokens,
        "policy/ratio": sums["ratio"] / tokens,
        "policy/clip_low": sums["clip_low"] / tokens,
        "policy/clip_high": sums["clip_high"] / tokens,
        "policy/dual_clip": sums["dual_clip"] / tokens,
        "optim/grad_norm": result.grad_norm,
        "optim/lr": result.lr,
        "time/train": seconds,
    }
