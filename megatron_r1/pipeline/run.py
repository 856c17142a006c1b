"""What can be known before any process starts: every input of every stage exists and fits. No torch.

`preflight` runs in the launching process, so that a mistake costs a second and leaves nothing behind.
"""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

from megatron_r1.checkpoint import folders
from megatron_r1.config.effects import check_effects
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.config.run import (
    EvalStage,
    ExportStage,
    GrpoStage,
    PretrainStage,
    RewardModelStage,
    RunConfig,
    SftStage,
    Stage,
    TrainStage,
)
from megatron_r1.config.validate import check_layout
from megatron_r1.convert.formats.hf_files import is_hf
from megatron_r1.convert.source import is_megatron, open_source
from megatron_r1.data.conversations import Conversations, open_batches, open_heldout
from megatron_r1.data.corpus import Corpus
from megatron_r1.data.preference_pairs import PairBatches, PreferencePairs
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer
from megatron_r1.model.megatron_fields import check_optimizer_fields, check_pass_through
from megatron_r1.model.megatron_traps import check_traps
from megatron_r1.model.precision import check_precision, row_alignment, row_multiple, transformer_engine_installed
from megatron_r1.model.presets import Architecture, architecture, load_architecture

logger = logging.getLogger(__name__)

SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Keys of config.json in which two different models differ at least."""


_CONVERSATIONS_TRIED = 4  # of a file, written and tokenised before the start


def preflight(config: RunConfig, processes: int) -> tuple[Architecture, Tokenizer]:
    """Open every input and check the layout of `processes` ranks; returns the architecture and the tokenizer.

    Raises UserError for the first thing that would fail later.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    arch = architecture(config.model, tokenizer.vocab_size)
    check_pass_through(config.model.megatron, latent_attention=arch["model_type"] == "deepseek_v3")
    check_layout(arch, config.parallel, None, megatron=config.model.megatron)
    check_precision(config.model, arch, config.parallel)
    # Whether the ranks have GPUs is not known here: they may run on other machines.
    installed = transformer_engine_installed()
    check_traps(arch, config.model, config.parallel, on_cpu=False, transformer_engine=installed)
    check_effects(config, arch)
    for stage in config.stage:
        if isinstance(stage, TrainStage):
            check_optimizer_fields(stage.optimizer.megatron, stage.name)
            _check_rows(stage, config.model, config.parallel)
        if stage.init_from is not None:
            _check_start(stage.init_from, stage, config, arch)
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
            _check_pairs(stage, config, tokenizer, arch)
        elif isinstance(stage, (GrpoStage, EvalStage)):
            _check_lengths(stage, arch)
            _check_first_prompt(stage, tokenizer, arch)
            if isinstance(stage, GrpoStage):
                _check_grpo(stage, config, processes)
        elif isinstance(stage, ExportStage) and stage.like is not None:
            _check_like(stage, stage.like, arch)
    return arch, tokenizer


def with_steps(config: RunConfig) -> RunConfig:
    """The recipe with the steps of stages that ask for `epochs`, counted on their files."""
    stages = [
        stage.model_copy(update={"steps": stage.planned_steps(len(Conversations(stage.data)))})
        if isinstance(stage, SftStage) and stage.epochs is not None
        else stage
        for stage in config.stage
    ]
    return config.model_copy(update={"stage": stages})


def start_of(config: RunConfig, index: int, run_dir: Path) -> Path | None:
    """The folder of the stage, or of checkpoints, that stage `index` starts from; None: fresh weights.

    Without `from` it is the last stage before it that trains a language model.
    """
    stage = config.stage[index]
    earlier = {s.name: s for s in config.stage[:index]}
    if stage.init_from is not None:
        return run_dir / stage.init_from if stage.init_from in earlier else Path(stage.init_from)
    trained = [s.name for s in config.stage[:index] if isinstance(s, (PretrainStage, SftStage, GrpoStage))]
    return run_dir / trained[-1] if trained else None


def checkpoint_of(path: Path) -> Path | None:
    """The weights that `path` is, or holds: a checkpoint of training (the newest of a stage's), a Hugging Face folder
    (an export stage's `hf` too), or a Megatron checkpoint that something else wrote.
    """
    if (path / folders.MANIFEST).is_file() or folders.of_training(path) or is_hf(path):
        return path
    found = folders.latest(path / "checkpoints") or folders.latest(path)
    if found is None and is_hf(path / "hf"):
        return path / "hf"
    return path if found is None and is_megatron(path) else found


def _check_start(source: str, stage: Stage, config: RunConfig, arch: Architecture) -> None:
    names = [each.name for each in config.stage]
    name = stage.name
    if source in names:
        origin = config.stage[names.index(source)]
        if names.index(source) >= names.index(name):
            raise UserError(f"stage.{name}.from = {source!r}: that stage comes later; stages run in the order written")
        if isinstance(origin, EvalStage):
            raise UserError(f"stage.{name}.from = {source!r}: an eval stage makes no weights; name a training stage")
        if isinstance(origin, RewardModelStage) and not isinstance(stage, RewardModelStage):
            raise UserError(
                f"stage.{name}.from = {source!r}: that stage makes a reward model, which has no output layer to "
                "write text with; only a reward_model stage can start from it. Name one that trains a language model"
            )
    elif not Path(source).is_dir():
        raise UserError(
            f"stage.{name}.from = {source!r}: neither a stage of this recipe ({', '.join(names)}) "
            "nor a checkpoint folder"
        )
    else:
        found = checkpoint_of(Path(source))
        if found is None:
            raise UserError(
                f"stage.{name}.from = {source!r}: that folder holds no complete checkpoint (step-<number>), no "
                "safetensors files of a Hugging Face model and no Megatron checkpoint"
            )
        if folders.of_training(found) or (found / folders.MANIFEST).is_file():
            folders.check(found)
        if not folders.of_training(found):
            scalar_head = isinstance(stage, RewardModelStage)
            open_source(found, arch, predictions=config.model.mtp is not False and not scalar_head)


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


def _check_pairs(stage: RewardModelStage, config: RunConfig, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Open the files, which checks every row, and tokenise pairs until one is short enough."""
    longest = stage.longest(arch["max_position_embeddings"])
    if config.parallel.dispatcher == "allgather" and 2 * longest > stage.micro_batch_tokens:
        raise UserError(
            f"stage.{stage.name}.micro_batch_tokens = {stage.micro_batch_tokens} with parallel.dispatcher = "
            f'"allgather": that dispatcher needs rows of one length, and a pair of two sequences of {longest} tokens '
            f"(max_length) must fit into one; set micro_batch_tokens = {2 * longest}, a smaller max_length, or alltoall"
        )
    for pairs in (stage.pairs, stage.heldout):
        if pairs is not None:
            source = PreferencePairs(pairs, tokenizer)
            PairBatches(source, shuffle=False, seed=0, exclude=frozenset(), max_tokens=longest).take(1)


def _check_conversations(stage: SftStage, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Open the files, which checks every row, and write and tokenise some conversations."""
    positions = arch["max_position_embeddings"]
    batches = open_batches(stage, tokenizer, positions)
    last = batches.take(min(_CONVERSATIONS_TRIED, stage.batch))[-1].token_ids[-1]
    if last != tokenizer.eos_id and not (stage.too_long == "truncate" and batches.truncated):
        end = tokenizer.decode([last])
        logger.warning(
            "stage.%s: a turn ends with %r, which is not the tokenizer's end of sequence: a grpo or eval stage ends "
            "its completions there only with sampling.stop = [%r], or with that eos_token in tokenizer_config.json",
            *(stage.name, end, end),
        )
    heldout = open_heldout(stage, tokenizer, positions)
    if heldout is not None:
        heldout.take(1)


def _check_lengths(stage: GrpoStage | EvalStage, arch: Architecture) -> None:
    longest, positions = stage.sampling.max_new_tokens, arch["max_position_embeddings"]
    if longest >= positions:
        raise UserError(
            f"stage.{stage.name}.sampling.max_new_tokens = {longest} leaves no room for a prompt: the model has "
            f"max_position_embeddings = {positions}. Ask for less than that"
        )


def _check_first_prompt(stage: GrpoStage | EvalStage, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Opening a source checks its rows; what a wrong template or tokenizer makes of them shows in the first."""
    source = open_prompts(stage.prompts, tokenizer)
    prompts = iter([source[0]]) if isinstance(source, PromptSource) else source.stream(0, None)
    longest = arch["max_position_embeddings"]
    for prompt in islice(prompts, 1):
        if len(prompt.token_ids) >= longest:
            raise UserError(
                f"stage.{stage.name}.prompts: prompt {prompt.id} has {len(prompt.token_ids)} tokens with its template, "
                f"but the model has max_position_embeddings = {longest}: nothing is left to answer with. Take a "
                'shorter template (template = "plain") or a model with more positions'
            )


def _check_grpo(stage: GrpoStage, config: RunConfig, processes: int) -> None:
    replicas = processes // (config.parallel.tensor * config.parallel.pipeline)
    if stage.grpo.prompts % replicas:
        raise UserError(
            f"stage.{stage.name}.grpo.prompts = {stage.grpo.prompts} does not divide over {replicas} data- and "
            "context-parallel replicas, each of which samples; use a multiple of it"
        )
