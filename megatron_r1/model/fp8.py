"""DeepSeek-V3's blockwise FP8 in plain torch: the reference of what Transformer Engine computes on Hopper.

`model/build.py` calls `emulate` on each chunk when precision = "fp8-emulated". Values are rounded to E4M3 and back and
multiplied in float32, so the effect of FP8 on losses and log-probs can be measured on any device, at several times the
cost of fp32. Scheme (technical report, arXiv 2412.19437, sections 3.2-3.3): inputs and gradients in tiles of 1x128,
weights in blocks of 128x128, everything E4M3, gradients too, and all three products of a linear layer:

    output  = Q(input, 1x128)     Q(weight, 128x128)^T       tiles along the width that is summed over
    d input = Q(d output, 1x128)  Q(weight, 128x128)
    d weight = Q(d output, 128x1)^T Q(input, 128x1)          tiles along the tokens, which are summed over here

Each operand is quantised from its own unrounded values, never twice. Not emulated: the 14-bit accumulation of Hopper's
tensor cores (Transformer Engine promotes partial sums to float32 too), and FP8 storage or dispatch of activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import fp8_utils, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.errors import UserError
from megatron_r1.model.block_fp8 import Scales, rounded
from megatron_r1.model.precision import BLOCK
from megatron_r1.model.specs import ReplicatedLinear

# Shapes: M tokens, K inputs, N outputs of a linear layer.


class Fp8Linear(torch.autograd.Function):
    """input [..., K] times weight [N, K] with all three products on rounded operands; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        """[..., N], in the dtype of `input`."""
        ctx.save_for_backward(input, weight)
        ctx.scales = scales
        flat = rounded(input.flatten(0, -2), (1, BLOCK), scales)
        output = flat @ rounded(weight, (BLOCK, BLOCK), scales).t()
        return output.to(input.dtype).unflatten(0, input.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Gradients in the dtypes of `input` and `weight`."""
        input, weight = ctx.saved_tensors
        grad_MN, input_MK = grad_output.flatten(0, -2), input.flatten(0, -2)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_MK = rounded(grad_MN, (1, BLOCK), ctx.scales) @ rounded(weight, (BLOCK, BLOCK), ctx.scales)
            grad_input = grad_MK.to(input.dtype).view_as(input)
        if ctx.needs_input_grad[1]:
            tiles = (BLOCK, 1)
            grad_NK = rounded(grad_MN, tiles, ctx.scales).t() @ rounded(input_MK, tiles, ctx.scales)
            grad_weight = grad_NK.to(weight.dtype)
        return grad_input, grad_weight, None


def emulate(model: GPTModel, config: TransformerConfig, scales: Scales) -> int:
    """Let the linear layers of a GPTModel's chunk compute as `Fp8Linear`. Returns how many do.

    They are those that Transformer Engine quantises: attention projections, dense, expert and shared-expert MLPs, and
    the projection of a multi-token-prediction layer. Embedding, router, output head, norms and the attention core keep
    their precision; so do first and last layers where first_last_layers_bf16 asks for it. Raises UserError where the
    layers are Transformer Engine's.
    """
    kinds = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear, ReplicatedLinear)
    layers = [
        layer
        for layer in model.decoder.layers
        if not fp8_utils.is_first_last_bf16_layer(config, layer.layer_number - 1)
    ]
    layers += [*model.mtp.layers] if getattr(model, "mtp", None) is not None else []
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, kinds)]
    if layers and not linears:
        raise UserError(
            'model.precision = "fp8-emulated" replaces the products of Megatron\'s own linear layers, but on this GPU '
            'they are Transformer Engine\'s; use "fp8-blockwise" there, or run without a GPU (CUDA_VISIBLE_DEVICES="")'
        )
    for module in linears:
        if isinstance(module, ReplicatedLinear):
            module.forward = partial(_replicated, module, scales)  # type: ignore[method-assign]
        else:
            module._forward_impl = partial(_parallel, scales)
    return len(linears)


@contextmanager
def any_token_count(models: Sequence[GPTModel]) -> Iterator[None]:
    """While it lasts, Transformer Engine's FP8 layers of these models take any number of tokens, as decoding needs.

    Its products want a multiple of 16; Megatron's wrapper pads for them. It is taken off again, because with sequence
    parallelism its backward would sum gradients twice: not for training. Does nothing in other precisions.
    """
    models = [model for model in models if model.config.fp8]
    for model in models:
        fp8_utils.prepare_model_for_fp8_inference(model)
    try:
        yield
    finally:
        for module in [module for model in models for module in model.modules()]:
            if module in fp8_utils._fp8_inference_wrapped_modules:
                del module.forward  # the wrapper hid the class's own method
                fp8_utils._fp8_inference_wrapped_modules.discard(module)


def _replicated(module: ReplicatedLinear, scales: Scales, input: torch.Tensor) -> tuple[torch.Tensor, None]:
    return Fp8Linear.apply(input, module.weight, scales), None


def _parallel(
    scales: Scales,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> torch.Tensor:
    """`_forward_impl` of Megatron's two parallel linear layers, with the same communication."""
    if sequence_parallel:
        input = tensor_parallel.gather_from_sequence_parallel_region(input, True, group=tp_group)
    elif allreduce_dgrad:
        input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = Fp8Linear.apply(input, weight, scales)
    return output if bias is None else output + bias
