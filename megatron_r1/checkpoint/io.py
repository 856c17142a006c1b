"""Save and load a training state through Megatron's dist_checkpointing (torch_dist format).

Holds the model, the optimizer with its schedule, the random-number states, the KL reference with its age, and the
loop's own state (data cursor, the phase being trained on). Tensors are stored as global arrays, so that another
layout can load them.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint import CheckpointException

from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import UserError
from megatron_r1.convert.origin import KEPT_CONFIG
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.presets import Architecture
from megatron_r1.model.reference import Reference
from megatron_r1.model.scalar_head import HEAD, RewardModel
from megatron_r1.parallel.world import World

logger = logging.getLogger(__name__)

_REFERENCE = "reference."
# Of an OSError that Megatron's writers or torch have wrapped; torch says either, by where in a file the disk ends.
_DISK_SIGNS = ("[Errno ", "PytorchStreamWriter failed", "inline_container.cc")


class ModelState(Protocol):
    """What weights are loaded into: `train.frozen.FrozenModel` is one."""

    world: World
    arch: Architecture
    step: int

    @property
    def models(self) -> list[PolicyModel]:
        """The bare models, one a virtual stage."""
        ...

    def weights_changed(self) -> None:
        """Called after weights were loaded."""
        ...


class TrainingState(ModelState, Protocol):
    """What is saved: `train.trainer.Trainer` is one."""

    optimizer: Any
    schedule: Any


def save(root: Path, trainer: TrainingState, loop: dict[str, Any], reference: Reference | None, *, keep: int) -> Path:
    """Write the checkpoint of trainer.step under `root`; all or nothing. Collective.

    `loop` must be equal on all ranks and hold plain Python values and tensors.
    """
    world = trainer.world
    first = world.rank == 0
    target = _raise_or(world.broadcast_from_0(_attempt(lambda: folders.begin(root, trainer.step)) if first else None))
    _save_without_a_manager_process()
    state = _sharded_state(trainer, reference, loading=False)
    state["loop"] = {
        **loop,
        "step": trainer.step,
        "layout": _layout(world),
        "distributed_optimizer": world.layout.distributed_optimizer,
        "reference_step": None if reference is None else reference.step,
    }
    try:
        dist_checkpointing.save(state, str(target))
    except (OSError, RuntimeError, CheckpointException) as error:
        # The others may be inside another collective of the save, so they are not told: they end with this rank.
        raise _disk_error(error) or error from None
    done = _attempt(lambda: folders.commit(target, {KEPT_CONFIG: trainer.arch}, keep)) if first else None
    return _raise_or(world.broadcast_from_0(done))


def load(path: Path, trainer: TrainingState, reference: Reference | None) -> dict[str, Any]:
    """Restore everything that `save` wrote and return the loop's state. Collective."""
    folders.check(path)
    state = _sharded_state(trainer, reference, loading=True)
    saved = dist_checkpointing.load_common_state_dict(str(path))["loop"]
    _check_optimizer_kind(path, saved, trainer.world)
    if list(saved["layout"]) != _layout(trainer.world):
        state.pop("rng")  # generators belong to ranks; another layout goes on with its own
    loaded = _load(state, path)
    _load_models(trainer, loaded)
    settings = _group_settings(trainer.optimizer)
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    _restore_group_settings(trainer.optimizer, settings)
    _separate_step_counts(trainer)
    trainer.schedule.load_state_dict(loaded["schedule"])
    trainer.step = loaded["loop"]["step"]
    if reference is not None:
        states = [loaded["reference"][_chunk_key(i)] for i in range(len(trainer.models))]
        reference.restore(states, loaded["loop"]["reference_step"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["default"])
        tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
    return dict(loaded["loop"])


_SETTINGS = ("max_lr", "min_lr", "lr_mult", "wd_mult", "betas", "eps", "weight_decay")


def _group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """What the recipe says of every parameter group."""
    return [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]


def _restore_group_settings(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Loading brings back the settings of the run that saved; those of the recipe rule."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def load_weights(path: Path, model: ModelState) -> None:
    """Only the model's weights (a stage that starts from another's result). Collective.

    A reward model that starts from a language model keeps its own head. Raises UserError the other way round.
    """
    folders.check(path)
    wants_head = isinstance(model.models[0], RewardModel)
    has_head = HEAD in dist_checkpointing.load_tensors_metadata(str(path))
    if has_head and not wants_head:
        raise UserError(
            f"checkpoint {path} holds a reward model, which has a scalar head instead of an output layer: only a "
            "reward_model stage can start from it. Set `from` to a stage that trained a language model"
        )
    state = _model_state(model)
    fresh = {key: part.pop(HEAD).data for key, part in state.items() if HEAD in part} if not has_head else {}
    loaded = _load(state, path)
    for key, weight in fresh.items():
        loaded[key][HEAD] = weight
    if wants_head and not has_head:
        logger.info("%s holds a language model: the scalar head of the reward model is new", path)
    _load_models(model, loaded)
    model.weights_changed()


def _sharded_state(trainer: TrainingState, reference: Reference | None, *, loading: bool) -> dict[str, Any]:
    _materialise_adam_state(trainer)
    models = _model_state(trainer)
    metadata = sharding_metadata(trainer.world)
    state: dict[str, Any] = {
        **models,
        "optimizer": _optimizer_state(trainer, models, metadata, loading=loading),
        "schedule": trainer.schedule.state_dict(),
        "rng": ShardedObject(
            "rng",
            {"default": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()},
            (trainer.world.size,),
            (trainer.world.rank,),
        ),
    }
    if reference is not None:
        with reference.swapped_in():
            copy = _model_state(trainer)
            dict_list_map_inplace(_with_own_data, copy)
        add_prefix_for_sharding(copy, _REFERENCE)
        state["reference"] = copy
    return state


def _optimizer_state(trainer: TrainingState, models: dict[str, Any], metadata: dict[str, Any], *, loading: bool) -> Any:
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", [])]
    with _positions_without_padding(buffers):
        state = trainer.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    for part in state.values():
        # A pipeline stage without experts would store an empty table where the others shard theirs, and Megatron
        # warns at every save of what ranks do not have in common.
        if isinstance(part, dict) and part.get("param_state") == {}:
            del part["param_state"]
    return state


@contextmanager
def _positions_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Inside the block a buffer's map gives parameters the places they have without the padding between buckets.

    Megatron-Core 0.16.1 gathers the optimizer state without that padding and then cuts the parameters out at places
    that count it (`sharded_param_state_fully_reshardable`). Behind a padded bucket every saved moment and master
    weight would be its neighbour's, with no more than a warning about the last one ("param range exceeds unpadded
    buffer"). There are several buckets when gradients are reduced in overlap, and for an embedding that the first
    and the last pipeline stage share (tied weights, multi-token prediction). Nothing else reads the map meanwhile.
    """
    kept = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [end - start - bucket.numel_unpadded for (start, end), bucket in _bounds(buffer)]
        before = [sum(padding[:i]) for i in range(len(padding))]
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, kept, strict=True):
            buffer.param_index_map = places


def _bounds(buffer: Any) -> Iterator[tuple[tuple[int, int], Any]]:
    return zip(buffer.bucket_indices, buffer.buckets, strict=True)


def _with_own_data(leaf: Any) -> Any:
    """A sharded leaf whose tensor no longer aliases the parameter."""
    if isinstance(leaf, (ShardedTensor, ShardedTensorFactory)) and leaf.data is not None:
        return dataclasses.replace(leaf, data=leaf.data.detach().clone())
    return leaf


def sharding_metadata(world: World) -> dict[str, Any]:
    """What Megatron is told for `sharded_state_dict`, always the same."""
    return {
        "dp_cp_group": world.data_context_group,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def _model_state(trainer: ModelState) -> dict[str, Any]:
    metadata = sharding_metadata(trainer.world)
    return {_chunk_key(i): m.sharded_state_dict(metadata=metadata) for i, m in enumerate(trainer.models)}


def _chunk_key(index: int) -> str:
    return "model" if index == 0 else f"model{index}"


def _load_models(trainer: ModelState, loaded: dict[str, Any]) -> None:
    for i, model in enumerate(trainer.models):
        model.load_state_dict(loaded[_chunk_key(i)], strict=True)


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise UserError(
            f"checkpoint {path} does not fit this model: {_cause(error)}. Was it written with another architecture?"
        ) from error


def _check_optimizer_kind(path: Path, saved: dict[str, Any], world: World) -> None:
    was, now = saved["distributed_optimizer"], world.layout.distributed_optimizer
    if was != now:
        raise UserError(
            f"checkpoint {path} holds the optimizer state of parallel.distributed_optimizer = {str(was).lower()}, "
            f"which cannot be loaded with {str(now).lower()}: Megatron-Core stores the two differently. "
            f"Set parallel.distributed_optimizer = {str(was).lower()}"
        )


def _layout(world: World) -> list[int]:
    layout = world.layout
    sizes = [layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.context, layout.expert, layout.etp]
    return [*sizes, world.data_size]


def _save_without_a_manager_process() -> None:
    """Hand results of a save over in a plain queue.

    Megatron-Core makes a multiprocessing manager for it: a second interpreter with torch, 280 MB and seconds a rank,
    that lives on when its rank is killed. Only asynchronous saving, where another process writes, needs one.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def _materialise_adam_state(trainer: TrainingState) -> None:
    """Give every parameter Adam state, and an optimizer without parameters the step count.

    torch's AdamW has no state before its first step, and a pipeline stage without experts has an expert optimizer
    without parameters; Megatron's state_dict asserts that it finds exactly one step count in either.
    """
    optimizer = trainer.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            state = part.optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(float(trainer.step))
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        if not parameters:
            part.optimizer.state["no parameters"] = {"step": torch.tensor(float(trainer.step))}


def _separate_step_counts(trainer: TrainingState) -> None:
    """Give every parameter its own step count after a load.

    Megatron's load gives all parameters one tensor, and torch's AdamW would count it up once for each of them.
    """
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _attempt(action: Any) -> Any:
    """The action's result, or a UserError as a value: every rank has to learn of it before anyone raises."""
    try:
        return action()
    except OSError as error:
        return _disk_error(error)


def _disk_error(error: BaseException) -> UserError | None:
    """What the user is told of a save that the disk refused; None where something else is wrong."""
    failures: dict[int, Any] = getattr(error, "failures", {})  # of a CheckpointException: rank -> (error, traceback)
    texts = [f"rank {rank}: {failure[0]}" for rank, failure in failures.items()] or [str(error)]
    refused = isinstance(error, OSError) or any(sign in text for text in texts for sign in _DISK_SIGNS)
    cure = (
        "Is the disk full? Free some space and run the same command again, or choose another --run-dir; older "
        "checkpoints are untouched"
    )
    return UserError(f"cannot write the checkpoint: {'; '.join(texts)}. {cure}") if refused else None


def _cause(error: BaseException) -> str:
    """One line of the message: the last where it is the trace of another process."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if isinstance(error, CheckpointException) else lines[0]
    return f"{type(error).__name__}: {line[:400]}"


def _raise_or(value: Any) -> Any:
    if isinstance(value, UserError):
        raise value
    return value
