"""Master weights, and what `[stage.optimizer.megatron]` may and may not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.model import megatron_fields
from megatron_r1.model.megatron_fields import OPTIMIZER_KEYS, OPTIMIZER_REFUSED, check_optimizer_fields
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World

VOCAB = 96


def build(
    world: World, precision: str = "bf16", sharded: bool = True, preset: str = "tiny-dense", **fields: Any
) -> tuple[Any, Any]:
    """(wrapped chunks, optimizer) of a model, gradients all zero."""
    from dataclasses import replace

    from megatron_r1.model.build import build_model, unwrap
    from megatron_r1.train.optimizer import build_optimizer, data_parallel

    layout = world.layout.model_copy(update={"distributed_optimizer": sharded})
    place = replace(world, layout=layout)
    model = ModelConfig.model_validate({"preset": preset, "precision": precision})
    recipe = OptimizerConfig.model_validate({"lr": 1e-5, "clip_grad": 0.0, "eps": 1e-12, **fields})
    chunks = build_model(architecture(model, VOCAB), model, place)
    wrapped = data_parallel(chunks, unwrap(chunks[0]).config, place, recipe)
    return wrapped, build_optimizer(recipe, model, wrapped, place)


def step(chunks: Any, optimizer: Any, gradient: float) -> None:
    """One step with the same gradient everywhere: Adam moves every parameter by lr."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(gradient)
    optimizer.step()


def test_every_buffer_of_parameters_is_gathered_once_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each of the two optimizers, of dense and of expert parameters, asks for all; and after both have moved."""
    from megatron_r1.train.optimizer import take_step

    chunks, optimizer = build(world, preset="tiny-moe")
    groups = [*chunks[0].bucket_groups, *chunks[0].expert_parallel_bucket_groups]
    assert len(groups) == len(optimizer.chained_optimizers) == 2
    gathered: list[tuple[Any, list[torch.Tensor]]] = []
    before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    for group in groups:
        gather = group.start_param_sync

        def note(group: Any = group, gather: Any = gather, **options: Any) -> None:
            gathered.append((group, [p.detach().clone() for p in chunks[0].parameters()]))
            gather(**options)

        monkeypatch.setattr(group, "start_param_sync", note)
    chunks[0].zero_grad_buffer()
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(3.0)
    count = sum(p.numel() for p in chunks[0].parameters())
    assert take_step(optimizer, chunks) == pytest.approx(3 * count**0.5, rel=1e-5)
    assert [group for group, _ in gathered] == groups
    after = list(chunks[0].named_parameters())
    for _, seen in gathered:
        assert all(torch.equal(a, b) for a, (_, b) in zip(seen, after, strict=True))
    assert any(not torch.equal(p, before[name]) for name, p in after if ".experts." in name)
    assert any(not torch.equal(p, before[name]) for name, p in after if ".experts." not in name)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
def test_master_weights_are_fp32_and_lose_no_tiny_update(world: World, sharded: bool) -> None:
    """An update of 1e-5 on a weight of 1 is far below bf16's step of 2^-8 there: the bf16 weight must stand still for
    hundreds of steps and then move, and the master weight must move at every step.
    """
    chunks, optimizer = build(world, sharded=sharded)
    name, parameter = next((n, p) for n, p in chunks[0].named_parameters() if n.endswith("input_layernorm.weight"))
    assert parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32, name
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    assert masters and {p.dtype for p in masters} == {torch.float32}
    assert sum(p.numel() for p in masters) == sum(p.numel() for p in chunks[0].parameters())
    main = parameter.main_param
    for _ in range(30):
        step(chunks, optimizer, -1.0)
    torch.testing.assert_close(main, torch.full_like(main, 1 + 30e-5), rtol=0, atol=2e-6)
    assert torch.equal(parameter, torch.ones_like(parameter))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    for _ in range(40):  # 1.0043 is nearer to 1 + 2^-7 than to 1: bf16 moves at last
        step(chunks, optimizer, -1.0)
    torch.testing.assert_close(main, torch.full_like(main, 1 + 430e-5), rtol=0, atol=2e-5)
    assert torch.equal(parameter, torch.full_like(parameter, 1 + 2**-7))


def test_fp32_parameters_are_their_own_masters(world: World) -> None:
    for precision in ("fp32", "fp8-emulated"):
        chunks, _ = build(world, precision)
        assert {p.dtype for p in chunks[0].parameters()} == {torch.float32}


def test_fields_reach_megatron_with_real_dtypes(world: World) -> None:
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    from megatron_r1.model.megatron_config import resolve_dtypes

    _, optimizer = build(world, megatron={"decoupled_weight_decay": False, "main_grads_dtype": "fp32"})
    assert optimizer.config.decoupled_weight_decay is False and optimizer.config.main_grads_dtype is torch.float32
    given = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "main_params_dtype": "fp16", "pin_cpu_grads": False}
    assert resolve_dtypes(given, MegatronOptimizerConfig) == {
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.uint8,
        "main_params_dtype": torch.float16,
        "pin_cpu_grads": False,
    }


def test_gradients_are_reduced_in_the_dtype_asked_for(world: World) -> None:
    """Only the buffers are looked at: the optimizer that takes bf16 gradients is Transformer Engine's."""
    from megatron_r1.model.build import build_model, unwrap
    from megatron_r1.train.optimizer import data_parallel

    model = ModelConfig(preset="tiny-dense", precision="bf16")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        chunks = build_model(architecture(model, VOCAB), model, world)
        recipe = OptimizerConfig(lr=1e-3, megatron={"main_grads_dtype": name})
        wrapped = data_parallel(chunks, unwrap(chunks[0]).config, world, recipe)
        assert {p.main_grad.dtype for p in wrapped[0].parameters()} == {dtype}


def test_what_megatron_refuses_names_the_table(world: World) -> None:
    reason = r"refuses stage\.optimizer\.megatron .*exp_avg_dtype can only be fp32 when not using precision-aware"
    with pytest.raises(UserError, match=reason):
        build(world, megatron={"exp_avg_dtype": "bf16"})
    with pytest.raises(UserError, match="optimizer_cpu_offload moves optimizer state from a GPU to the CPU"):
        build(world, megatron={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": 1.0}, "stage.r1.optimizer.megatron: lr follows from stage.optimizer.lr; set it there"),
        ({"use_distributed_optimizer": False}, "follows from parallel.distributed_optimizer"),
        ({"optimizer": "sgd"}, "optimizer is not free"),
        ({"exp_avg_dtyp": "bf16"}, "Megatron's OptimizerConfig has no such field; did you mean exp_avg_dtype"),
        ({"exp_avg_dtype": "bf17"}, "exp_avg_dtype: got 'bf17'; Megatron declares it as torch.dtype ('fp32', 'bf16',"),
        ({"pin_cpu_grads": "yes"}, "pin_cpu_grads: got 'yes'; Megatron declares it as bool"),
        ({"use_precision_aware_optimizer": True}, "needs Transformer Engine's Adam, which is not installed"),
        ({"optimizer_cpu_offload": True}, "without optimizer_offload_fraction offloads nothing"),
    ],
)
def test_fields_are_checked_before_any_process_starts(
    fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_fields, "transformer_engine_installed", lambda: False)
    with pytest.raises(UserError) as caught:
        check_optimizer_fields(fields, "r1")
    assert words in str(caught.value)


def test_the_useful_ones_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_fields, "transformer_engine_installed", lambda: True)
    check_optimizer_fields(
        {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": "bf16",
            "exp_avg_dtype": "bf16",
            "exp_avg_sq_dtype": "bf16",
        },
        "r1",
    )
    check_optimizer_fields({}, "r1")


def test_every_named_field_exists() -> None:
    import dataclasses

    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    known = {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}
    assert known >= {*OPTIMIZER_KEYS, *OPTIMIZER_REFUSED}
