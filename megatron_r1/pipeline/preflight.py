"""What can be known before any process starts: every input of every stage exists and fits. No torch.

`preflight` runs in the launching process, so that a mistake costs a second and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint import folders
from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.effects import check_effects
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.stages import (
    DistillStage,
    EvalStage,
    ExportStage,
    GrpoStage,
    MixStage,
    PreferencesStage,
    PretrainStage,
    RewardModelStage,
    SampleStage,
    SftStage,
    Stage,
    TrainStage,
)
from megatron_r1.config.validate import check_layout, check_teacher
from megatron_r1.convert.source import open_source
from megatron_r1.data.conversations import Conversations, open_batches, open_heldout
from megatron_r1.data.corpus import Corpus
from megatron_r1.data.labelled_answers import LabelledAnswers
from megatron_r1.data.mixing import read_questions
from megatron_r1.data.preference_pairs import PreferencePairs
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.reward_rows import RewardBatches, RewardRows
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer
from megatron_r1.model.megatron_fields import check_optimizer_fields, check_pass_through
from megatron_r1.model.megatron_traps import check_traps
from megatron_r1.model.precision import check_precision, row_alignment, row_multiple, transformer_engine_installed
from megatron_r1.model.presets import Architecture, architecture, load_architecture
from megatron_r1.pipeline.graph import run_order
from megatron_r1.pipeline.inputs import checkpoint_of
from megatron_r1.pipeline.making.hooks import check_hooks
from megatron_r1.pipeline.reward_checks import check_rewards

logger = logging.getLogger(__name__)

SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Keys of config.json in which two different models differ at least."""


_CONVERSATIONS_TRIED = 4  # of a file, written and tokenised before the start


def preflight(config: RunConfig, processes: int, ahead: Collection[str] | None = None) -> Tokenizer:
    """Open every input and check the layout of `processes` ranks; returns the tokenizer.

    ahead: names of the stages whose inputs are looked at; None: all. Data that a stage of the recipe will write is
    looked at when its turn comes. Raises UserError for the first thing that would fail later.
    """
    run_order(config)
    tokenizer = build_tokenizer(config.tokenizer)
    models: dict[str | None, ModelConfig] = {None: config.model}
    models.update(config.models.items())
    archs = {name: architecture(model, tokenizer.vocab_size) for name, model in models.items()}
    # Whether the ranks have GPUs is not known here: they may run on other machines.
    installed = transformer_engine_installed()
    for name, model in models.items():
        check_pass_through(model.megatron, latent_attention=archs[name]["model_type"] == "deepseek_v3")
        check_layout(archs[name], config.parallel, None, megatron=model.megatron)
        check_precision(model, archs[name], config.parallel)
        check_traps(archs[name], model, config.parallel, on_cpu=False, transformer_engine=installed)
    check_effects(config, archs)
    for stage in config.stage:
        if ahead is None or stage.name in ahead:
            check_stage(stage, config, processes, tokenizer, archs[stage.model])
    return tokenizer


def check_stage(stage: Stage, config: RunConfig, processes: int, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Open the inputs of one stage that are there before it begins.

    Raises:
        UserError: one is missing or does not fit.
    """
    if isinstance(stage, TrainStage):
        check_optimizer_fields(stage.optimizer.megatron, stage.name)
        _check_rows(stage, config.model_of(stage), config.parallel)
    if stage.init_from is not None and stage.init_from not in [each.name for each in config.stage]:
        _check_folder("from", stage.init_from, stage, config, arch)
    if config.parallel.dispatcher == "allgather" and not getattr(stage, "packing", True):
        raise UserError(
            f'stage.{stage.name}.packing = false with parallel.dispatcher = "allgather": that dispatcher needs '
            "rows of one length on all ranks, which only packed rows have; set packing = true, or use alltoall"
        )
    if isinstance(stage, PretrainStage):
        for corpus in stage.corpus:
            next(Corpus(corpus, config.seed))
    elif isinstance(stage, SftStage):
        _check_conversations(stage, tokenizer, arch)
    elif isinstance(stage, RewardModelStage):
        _check_reward_rows(stage, config, tokenizer, arch)
    elif isinstance(stage, EvalStage):
        for asked in config.problem_sets(stage):
            _check_lengths(asked.key, asked.table.sampling, arch)
            _check_first_prompt(asked.key, asked.prompts, tokenizer, arch)
    elif isinstance(stage, (GrpoStage, DistillStage, SampleStage, PreferencesStage)):
        _check_lengths(f"stage.{stage.name}", stage.sampling, arch)
        for prompts in stage.prompts:
            _check_first_prompt(f"stage.{stage.name}", prompts, tokenizer, arch)
        if isinstance(stage, GrpoStage):
            _check_grpo(stage, config, processes)
            check_rewards(stage, config)
        elif isinstance(stage, DistillStage):
            _check_distillation(stage, config, processes, tokenizer, arch)
        elif isinstance(stage, (SampleStage, PreferencesStage)):
            check_hooks(stage)
    elif isinstance(stage, MixStage):
        _check_mix(stage)
    elif isinstance(stage, ExportStage) and stage.like is not None:
        _check_like(stage, stage.like, arch)


def _check_folder(key: str, source: str, stage: Stage, config: RunConfig, arch: Architecture) -> None:
    """Weights from outside of the recipe."""
    name = stage.name
    if not Path(source).is_dir():
        names = ", ".join(each.name for each in config.stage)
        raise UserError(f"stage.{name}.{key} = {source!r}: neither a stage of this recipe ({names}) nor a folder")
    found = checkpoint_of(Path(source))
    if found is None:
        raise UserError(
            f"stage.{name}.{key} = {source!r}: that folder holds no complete checkpoint (step-<number>), no "
            "safetensors files of a Hugging Face model and no Megatron checkpoint"
        )
    if folders.of_training(found) or (found / folders.MANIFEST).is_file():
        folders.check(found)
    if not isinstance(stage, RewardModelStage) and folders.of_training(found) and folders.holds_reward_model(found):
        raise UserError(
            f"stage.{name}.{key} = {source!r}: {found} holds a reward model, which has a scalar head instead of an "
            "output layer: only a reward_model stage can start from it. Name weights of a language model"
        )
    if not folders.of_training(found):
        scalar_head = isinstance(stage, RewardModelStage)
        open_source(found, arch, predictions=config.model_of(stage).mtp is not False and not scalar_head)


def _check_like(stage: ExportStage, like: Path, arch: Architecture) -> None:
    given = load_architecture(like)
    differing = [key for key in SHAPE_KEYS if given.get(key) != arch.get(key)]
    if differing:
        shown = ", ".join(f"{key} = {given.get(key)} instead of {arch.get(key)}" for key in differing)
        raise UserError(f"stage.{stage.name}.like: {like} is another model than the one trained: {shown}")


def _check_rows(stage: TrainStage, model: ModelConfig, layout: ParallelConfig) -> None:
    least = row_alignment(layout, row_multiple(model.precision))
    if stage.micro_batch_tokens < least:
        raise UserError(
            f"stage.{stage.name}.micro_batch_tokens = {stage.micro_batch_tokens}: with parallel.tensor = "
            f'{layout.tensor}, parallel.context = {layout.context} and model.precision = "{model.precision}" a row has '
            f"a multiple of {least} tokens, so every sequence would be a micro-batch of its own; set "
            f"micro_batch_tokens = {least} or more"
        )


def _check_reward_rows(stage: RewardModelStage, config: RunConfig, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Open the files, which checks every row, and tokenise pairs or answers until one is short enough."""
    longest = stage.longest(arch["max_position_embeddings"])
    together = 2 if stage.loss == "pairwise" else 1
    if config.parallel.dispatcher == "allgather" and together * longest > stage.micro_batch_tokens:
        raise UserError(
            f"stage.{stage.name}.micro_batch_tokens = {stage.micro_batch_tokens} with parallel.dispatcher = "
            f'"allgather": that dispatcher needs rows of one length, and {together} of {longest} tokens (max_length) '
            f"must fit into one; set micro_batch_tokens = {together * longest}, a smaller max_length, or alltoall"
        )
    opened: list[RewardRows[Any, Any]] = []
    opened += [PreferencePairs(given, tokenizer) for given in (stage.pairs, stage.heldout) if given and not given.stage]
    labels = (stage.labels, stage.heldout_labels)
    opened += [LabelledAnswers(given, tokenizer) for given in labels if given and not given.stage]
    for source in opened:
        RewardBatches(source, shuffle=False, seed=0, exclude=frozenset(), max_tokens=longest).take(1)


def _check_conversations(stage: SftStage, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Open the files, which checks every row, and write and tokenise some conversations."""
    positions = arch["max_position_embeddings"]
    if stage.data.stage is not None:
        return
    batches = open_batches(stage, tokenizer, positions)
    last = batches.take(min(_CONVERSATIONS_TRIED, stage.batch))[-1].token_ids[-1]
    if last != tokenizer.eos_id and not (stage.too_long == "truncate" and batches.truncated):
        end = tokenizer.decode([last])
        logger.warning(
            "stage.%s: a turn ends with %r, which is not the tokenizer's end of sequence: a grpo or eval stage ends "
            "its completions there only with sampling.stop = [%r], or with that eos_token in tokenizer_config.json",
            *(stage.name, end, end),
        )
    if stage.heldout is None or stage.heldout.stage is not None:
        return
    heldout = open_heldout(stage, tokenizer, positions)
    assert heldout is not None
    heldout.take(1)


def _check_mix(stage: MixStage) -> None:
    """Open the files, which checks every row; what an earlier stage is to make is not there yet."""
    for source in stage.sources:
        if source.stage is None:
            Conversations(source)
    for path in stage.decontaminate.files:
        read_questions(path, stage.decontaminate.key)


def _check_lengths(key: str, sampling: SamplingConfig, arch: Architecture) -> None:
    longest, positions = sampling.max_new_tokens, arch["max_position_embeddings"]
    if longest >= positions:
        raise UserError(
            f"{key}.sampling.max_new_tokens = {longest} leaves no room for a prompt: the model has "
            f"max_position_embeddings = {positions}. Ask for less than that"
        )


def _check_first_prompt(key: str, config: PromptsConfig, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Opening a source checks its rows; what a wrong template or tokenizer makes of them shows in the first."""
    longest = arch["max_position_embeddings"]
    source = open_prompts(config, tokenizer)
    prompts = iter([source[0]]) if isinstance(source, PromptSource) else source.stream(0, None)
    for prompt in islice(prompts, 1):
        if len(prompt.token_ids) >= longest:
            raise UserError(
                f"{key}.prompts: prompt {prompt.id} has {len(prompt.token_ids)} tokens with its "
                f"template, but the model has max_position_embeddings = {longest}: nothing is left to answer with. "
                'Take a shorter template (template = "plain") or a model with more positions'
            )


def _check_grpo(stage: GrpoStage, config: RunConfig, processes: int) -> None:
    _check_shared(f"stage.{stage.name}.grpo.prompts", stage.grpo.prompts, config, processes)


def _check_distillation(
    stage: DistillStage, config: RunConfig, processes: int, tokenizer: Tokenizer, arch: Architecture
) -> None:
    _check_shared(f"stage.{stage.name}.questions", stage.questions, config, processes)
    model = config.model if stage.teacher_model is None else config.models[stage.teacher_model]
    teacher = architecture(model, tokenizer.vocab_size)
    check_teacher(stage.name, arch, teacher)
    if stage.teacher not in [each.name for each in config.stage]:
        _check_folder("teacher", stage.teacher, stage, config, teacher)


def _check_shared(key: str, prompts: int, config: RunConfig, processes: int) -> None:
    """Every replica samples equally many prompts."""
    replicas = processes // (config.parallel.tensor * config.parallel.pipeline)
    if prompts % replicas:
        raise UserError(
            f"{key} = {prompts} does not divide over {replicas} data- and context-parallel replicas, each of which "
            "samples; use a multiple of it"
        )
