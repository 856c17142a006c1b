"""Saving and loading the whole training state on one process, and what happens when the disk is full."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.optim import OptimizerConfig
from megatron_r1.data.batching import make_micro_batches
from megatron_r1.model.presets import architecture
from megatron_r1.model.reference import Reference
from megatron_r1.parallel.world import World
from megatron_r1.types import Sample

VOCAB = 96
SMALL = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, schedule="cosine", min_lr=1e-4)


def make_trainer(world: World, seed: int, preset: str = "tiny-moe", precision: str = "fp32", **override: int) -> Any:
    """A trainer with weights of its own."""
    from megatron_r1.train.trainer import Trainer

    sizes = {**SMALL, **override} if preset == "tiny-moe" else override
    model = ModelConfig(preset=preset, precision=precision, override=sizes)
    trainer = Trainer(architecture(model, VOCAB), model, world, OPTIMIZER, steps=10)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in weights(trainer).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=draw).abs())
    trainer.optimizer.reload_model_params()
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the model by name, not copied."""
    state = trainer.models[0].state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def copied(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights(trainer).items()}


def step(trainer: Any, seed: int) -> tuple[float, float, float]:
    """One step of language modelling on random tokens: (loss, gradient norm, learning rate)."""
    from megatron_r1.train.objectives import LanguageModelObjective

    draw = random.Random(seed)
    samples = [
        Sample(token_ids=[draw.randrange(VOCAB) for _ in range(draw.randint(5, 20))], prompt_length=1) for _ in range(8)
    ]
    (batches,) = make_micro_batches(samples, 64, 0, packed=True, mtp_depths=trainer.mtp_depths)
    result = trainer.train_step(batches, LanguageModelObjective(mtp_loss=0.1))
    return result.sums["nll"], result.grad_norm, result.lr


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def with_optimizer(world: World, sharded: bool) -> World:
    layout = world.layout.model_copy(update={"distributed_optimizer": sharded})
    return dataclasses.replace(world, layout=layout)


@pytest.fixture(scope="module", params=["sharded optimizer", "replicated optimizer", "bf16"])
def saved(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint of step 2 with a reference of other weights, and what came after it without interruption."""
    from megatron.core import tensor_parallel

    from megatron_r1.checkpoint import io

    world = with_optimizer(world, sharded=request.param != "replicated optimizer")
    precision = "bf16" if request.param == "bf16" else "fp32"
    root = tmp_path_factory.mktemp("checkpoints")
    trainer = make_trainer(world, seed=1, precision=precision)
    reference = Reference(trainer.models, step=0)
    draw = torch.Generator().manual_seed(8)
    for kept in reference.weights:
        kept.add_((10 * torch.rand(kept.shape, generator=draw) + 1).to(kept.dtype))
    with reference.swapped_in():
        kept_weights = copied(trainer)
    step(trainer, 0)
    step(trainer, 1)
    path = io.save(root, trainer, {"cursor": [3, {"a": None}], "phase": None}, reference, keep=1)
    draws = [torch.rand(3).tolist()]
    with tensor_parallel.get_cuda_rng_tracker().fork():
        draws.append(torch.rand(3).tolist())
    at_save = copied(trainer)
    return {
        "world": world,
        "precision": precision,
        "path": path,
        "reference": kept_weights,
        "at_save": at_save,
        "draws": draws,
        "later": [step(trainer, 2), step(trainer, 3)],
        "after": copied(trainer),
    }


def test_the_loaded_state_goes_on_as_if_nothing_had_happened(saved: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    from megatron_r1.checkpoint import io

    trainer = make_trainer(saved["world"], seed=2, precision=saved["precision"])
    reference = Reference(trainer.models, step=99)
    assert any(not torch.equal(a, saved["at_save"][name]) for name, a in weights(trainer).items())
    torch.manual_seed(77)
    loop = io.load(saved["path"], trainer, reference)
    assert (loop["cursor"], loop["phase"], loop["step"], trainer.step) == ([3, {"a": None}], None, 2, 2)
    assert [torch.rand(3).tolist()] == saved["draws"][:1]
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.rand(3).tolist() == saved["draws"][1]
    assert_equal(copied(trainer), saved["at_save"])
    assert reference.step == 0
    with reference.swapped_in():
        assert_equal(copied(trainer), saved["reference"])
    assert [step(trainer, 2), step(trainer, 3)] == saved["later"], "loss, gradient norm and learning rate, to the bit"
    assert_equal(copied(trainer), saved["after"])


def test_every_tensor_of_the_reference_differs_from_the_policy_s(saved: dict[str, Any]) -> None:
    assert any("expert_bias" in name for name in saved["reference"])
    same = [name for name, tensor in saved["reference"].items() if torch.equal(tensor, saved["at_save"][name])]
    assert same == []


def test_only_the_weights(saved: dict[str, Any]) -> None:
    from megatron_r1.checkpoint import io

    trainer = make_trainer(saved["world"], seed=3, precision=saved["precision"])
    io.load_weights(saved["path"], trainer)
    assert trainer.step == 0
    assert_equal(copied(trainer), saved["at_save"])
    step(trainer, 5)
    other = make_trainer(saved["world"], seed=4, precision=saved["precision"])
    with torch.no_grad():
        for name, tensor in weights(other).items():
            tensor.copy_(saved["at_save"][name])
    other.optimizer.reload_model_params()
    step(other, 5)
    assert_equal(copied(trainer), copied(other))


def test_another_architecture_is_refused(world: World, saved: dict[str, Any]) -> None:
    from megatron_r1.checkpoint import io

    for trainer in (make_trainer(world, 1, intermediate_size=56), make_trainer(world, 1, "tiny-dense")):
        with pytest.raises(UserError, match=r"does not fit this model: .*written with another architecture"):
            io.load_weights(saved["path"], trainer)


def test_another_kind_of_optimizer_is_refused(saved: dict[str, Any]) -> None:
    from megatron_r1.checkpoint import io

    was = saved["world"].layout.distributed_optimizer
    trainer = make_trainer(with_optimizer(saved["world"], not was), seed=1, precision=saved["precision"])
    words = rf"distributed_optimizer = {was}.*with {not was}.*Set parallel\.distributed_optimizer = {was}".lower()
    with pytest.raises(UserError) as caught:
        io.load(saved["path"], trainer, None)
    assert re.search(words, str(caught.value).lower())


def test_a_torn_checkpoint_is_refused_before_anything_is_loaded(
    world: World, saved: dict[str, Any], tmp_path: Path
) -> None:
    from megatron_r1.checkpoint import io

    torn = shutil.copytree(saved["path"], tmp_path / saved["path"].name)
    largest = max(torn.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    trainer = make_trainer(world, seed=5)
    before = copied(trainer)
    for load in (lambda: io.load(torn, trainer, None), lambda: io.load_weights(torn, trainer)):
        with pytest.raises(UserError, match=rf"is damaged: {largest.name} has \d+ bytes instead of"):
            load()
    assert_equal(copied(trainer), before)


@pytest.fixture
def largest_file() -> Iterator[Any]:
    """Set the largest file that this process may write; restored afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(world: World, tmp_path: Path, largest_file: Any) -> None:
    """The kernel refuses to write on, in the middle of a tensor; the same save works once there is room."""
    from megatron_r1.checkpoint import io

    trainer = make_trainer(world, seed=1)
    older = io.save(tmp_path, trainer, {}, None, keep=1)
    trainer.step = 1
    largest_file(100_000)
    with pytest.raises(UserError) as caught:
        io.save(tmp_path, trainer, {}, None, keep=1)
    assert "cannot write the checkpoint: " in str(caught.value) and "Is the disk full? Free some space" in str(
        caught.value
    )
    assert folders.steps(tmp_path) == [0] and not folders.folder(tmp_path, 1).exists()
    folders.check(older)
    largest_file(resource.RLIM_INFINITY)
    io.save(tmp_path, trainer, {}, None, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    folders.check(folders.folder(tmp_path, 1))


def test_a_folder_that_cannot_be_made_is_the_user_s_to_mend(world: World, tmp_path: Path) -> None:
    from megatron_r1.checkpoint import io

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the checkpoint: .*Not a directory"):
        io.save(tmp_path / "file" / "checkpoints", make_trainer(world, seed=1), {}, None, keep=1)


def test_the_recipes_optimizer_settings_rule_after_a_resume(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_r1.checkpoint import io as checkpoint_io

    trainer = make_trainer(world, seed=1)
    step(trainer, 0)
    checkpoint_io.save(tmp_path, trainer, {}, None, keep=1)
    monkeypatch.setattr(f"{__name__}.OPTIMIZER", OptimizerConfig(lr=1e-3, weight_decay=0.5, beta2=0.9))
    resumed = make_trainer(world, seed=2)
    checkpoint_io.load(folders.folder(tmp_path, 1), resumed, None)
    assert resumed.step == 1
    assert step(resumed, 1)[2] == pytest.approx(1e-3)
    for group in resumed.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        assert group["weight_decay"] == pytest.approx(0.5 * group["wd_mult"])
