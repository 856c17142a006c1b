"""Build this rank's chunks of a model. The one place that constructs a GPTModel."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model import kernels
from megatron_r1.model.fp8 import emulate
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.megatron_config import transformer_config
from megatron_r1.model.presets import Architecture, has_experts
from megatron_r1.model.scalar_head import RewardModel
from megatron_r1.model.specs import decoder_spec, mtp_spec, transformer_engine_available
from megatron_r1.parallel.world import World

logger = logging.getLogger(__name__)


def build_model(
    arch: Architecture, model: ModelConfig, world: World, *, scalar_head: bool = False
) -> list[torch.nn.Module]:
    """This rank's model chunks, one per virtual pipeline stage, with freshly drawn weights. Collective.

    Raises UserError as `model_config` does.

    A chunk is a PolicyModel (scalar_head: a RewardModel, without multi-token prediction), inside Megatron's
    Float16Module where parameters are bf16 (see `unwrap`).

    The weights drawn depend on the layout; start from a checkpoint to compare layouts.
    """
    on_cpu = world.device.type == "cpu"
    config = model_config(arch, model, world, scalar_head=scalar_head)
    stages = world.layout.virtual_pipeline
    kind = RewardModel if scalar_head else PolicyModel
    chunks = [_chunk(kind, arch, config, stage if stages > 1 else None, world) for stage in range(stages)]
    if world.rank == 0:
        backend = "Transformer Engine" if transformer_engine_available() else "local (torch)"
        count = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        logger.info("layer spec: %s; %s parameters on rank 0", backend, f"{count:,}")
        logger.info("kernels: %s; precision %s", kernels.available(on_cpu=on_cpu).describe(), model.precision)
    if model.precision == "fp8-emulated":
        for chunk in chunks:
            emulate(chunk, config, model.fp8_scales)
    if not on_cpu:
        chunks = [chunk.to(world.device) for chunk in chunks]
    if config.bf16:
        return [Float16Module(config, chunk) for chunk in chunks]
    return list(chunks)


def model_config(
    arch: Architecture, model: ModelConfig, world: World, *, scalar_head: bool = False
) -> TransformerConfig:
    """Megatron's configuration of the model on this rank's device. Builds nothing.

    Raises UserError for a model with experts on a GPU without Transformer Engine, for a precision that this device does
    not have, and for what `transformer_config` refuses.
    """
    on_cpu = world.device.type == "cpu"
    kernels.require_fp8(model)
    if not on_cpu and has_experts(arch) and not transformer_engine_available():
        raise UserError(
            "a model with experts on a GPU needs Transformer Engine, which is not installed: pip install "
            "'megatron-r1[gpu]'. Without it Megatron-Core 0.16.1 has neither its grouped GEMM and fused permutation of "
            "tokens nor multi-latent attention there"
        )
    if scalar_head:
        model = _without_prediction_layers(model)
    return transformer_config(arch, model, world.layout, on_cpu=on_cpu)


def _without_prediction_layers(model: ModelConfig) -> ModelConfig:
    """The same `[model]` for a reward model, which has no multi-token-prediction layers to place on a stage."""
    megatron = dict(model.megatron)
    layout = megatron.get("pipeline_model_parallel_layout")
    if isinstance(layout, str):
        megatron["pipeline_model_parallel_layout"] = layout.replace("m", "")  # the letter of those layers
    return model.model_copy(update={"mtp": False, "megatron": megatron})


def padded_vocab(arch: Architecture, tensor_size: int) -> int:
    """Vocabulary rounded up so that tensor-parallel ranks hold equal shares; log-probs ignore the added entries."""
    return -(-int(arch["vocab_size"]) // tensor_size) * tensor_size


def unwrap(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, PolicyModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _chunk(
    kind: type[PolicyModel], arch: Architecture, config: TransformerConfig, vp_stage: int | None, world: World
) -> PolicyModel:
    scaling = {} if config.multi_latent_attention else arch.get("rope_scaling") or {}
    model = kind(
        config,
        decoder_spec(config, vp_stage),
        vocab_size=padded_vocab(arch, world.layout.tensor),
        max_sequence_length=arch["max_position_embeddings"],
        # MLA applies its rotary embedding inside the attention.
        position_embedding_type="none" if config.multi_latent_attention else "rope",
        rotary_base=int(arch["rope_theta"]),
        rope_scaling=bool(scaling),  # the llama3 rule, the only one for these architectures
        rope_scaling_factor=float(scaling.get("factor", 8.0)),
        share_embeddings_and_output_weights=bool(arch.get("tie_word_embeddings")) and kind is PolicyModel,
        mtp_block_spec=mtp_spec(config, vp_stage),
        vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    model.unpadded_vocab = int(arch["vocab_size"])
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Also at expert-parallel size 1: then every layout has the same pair of optimizers (dense, expert) and
            # optimizer state can be loaded under another expert-parallel size.
            parameter.allreduce = False  # type: ignore[attr-defined]
    return model
