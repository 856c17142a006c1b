"""Megatron's older checkpoints: one file of torch.save a model-parallel rank, put together again without torch.

The planner reads one through `read_legacy`, as it would a torch_dist checkpoint: whole tensors with global names, made
of boxes that lie in the ranks' files. No byte of a tensor is read here.

`iter_N/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` (`model_rng.pt` where a distributed optimizer is apart) of a run
that saved with `--ckpt-format torch`:

* a dict with `model`, or `model0`, `model1`, ... under interleaved pipelining, each a flat state dict; `args`, and
  unless left out `optimizer`, `opt_param_scheduler`, `rng_state`;
* `_PPP` is there with more than one pipeline stage and `_EEE` with more than one expert rank, so that `mp_rank_00_001`
  can mean either. The final norm tells: one stage has it, but every expert rank;
* layers are counted from 0 in every stage and chunk. Chunk v of stage p comes before chunk v of stage p + 1, and chunk
  v of all stages before chunk v + 1 (`get_transformer_layer_offset`), also where stages differ in size; experts are
  counted from 0 in every expert rank;
* a shard of a gated fc1 is the rank's gate rows, then its up rows;
* the last stage repeats the embedding for multi-token prediction, and as `output_layer.weight` where the two are tied;
* parameters may be views of one storage, the optimizer's buffer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.names import places
from megatron_r1.convert.formats.torch_dist import checkpoint_folder
from megatron_r1.convert.formats.torch_zip import damaged
from megatron_r1.convert.formats.unpickle import Inert, Lazy, read_torch
from megatron_r1.convert.storage import Archive, Chunk, Stored

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_CHUNK = re.compile(r"model\d+")
_LAYER = re.compile(r"(?P<block>decoder|mtp)\.layers\.(?P<number>\d+)(?=\.)")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)(local_experts\.|linear_fc[12]\.(?:weight|bias))(\d+)(?=\.|$)")
_FINAL = "decoder.final_layernorm.weight"
_GROUPED = re.compile(r".*\.mlp\.experts\.weight[12]")

Rank = tuple[int, int, int]
"""Tensor, pipeline and expert rank."""
Firsts = dict[str, int]
"""Global number of the first layer of each block in one chunk of one stage."""


@dataclass(frozen=True)
class _File:
    """What one rank saved. models: a state dict for each chunk of its stage."""

    path: Path
    args: dict[str, Any]
    models: list[dict[str, Any]]
    others: tuple[str, ...]


def is_legacy(folder: Path) -> bool:
    """Whether `folder` holds `mp_rank_*` folders."""
    return any(_RANK.fullmatch(entry.name) for entry in folder.iterdir()) if folder.is_dir() else False


def read_legacy(folder: Path, split: Callable[[str], str]) -> Archive:
    """Every tensor of a legacy checkpoint under its canonical name, a chunk a shard (two of a gated fc1).

    folder: as `checkpoint_folder` takes it. split: canonical name -> "column" or "vocab" (rows are divided), "row"
    (columns), "gate_up" (the rows of each half), "none" (all ranks have it; rank 0's is taken). Objects are the other
    entries of the files, of rank 0. Raises UserError for files that are missing, damaged or no Megatron-Core model's,
    and for shards that do not fit together.
    """
    folder = checkpoint_folder(folder)
    files = _read(folder)
    sizes = _sizes(folder, files)
    starts = _first_layers(files, sizes)
    tensors: dict[str, Stored] = {}
    objects = dict.fromkeys(files[0, 0, 0].others)
    tied = files[0, 0, 0].args.get("untie_embeddings_and_output_weights") is False
    for stage, chunk in product(range(sizes[1]), range(len(files[0, 0, 0].models))):
        for name, shards in _shards(files, sizes, stage, chunk, starts[stage, chunk]):
            if not isinstance(shards[0][1], Lazy) or name.endswith("_extra_state"):
                objects[name] = None
                continue
            if tied and name == "output_layer.weight":
                continue
            stored = _join(name, shards, split)
            if tensors.setdefault(stored.name, stored) is not stored and not stored.name.startswith("embedding."):
                raise damaged(str(folder), f"two pipeline stages hold {stored.name}")
    return Archive(folder, "legacy", tensors, tuple(objects))


def _read(folder: Path) -> dict[Rank, _File]:
    found: dict[tuple[int, ...], Path] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _RANK.fullmatch(entry.name):
            found[tuple(int(number) for number in match.groups() if number is not None)] = entry
    if not found:
        raise UserError(f"{folder} is no legacy checkpoint: it has no folder like mp_rank_00; see {folder.parent}")
    if len({len(rank) for rank in found}) > 1:
        raise UserError(f"{folder} mixes mp_rank_* folders of different layouts: keep those of one run")
    with ThreadPoolExecutor() as pool:
        files = dict(zip(found, pool.map(_file, found.values()), strict=True))
    final = sum(any(_FINAL in model for model in file.models) for rank, file in files.items() if rank[0] == 0)
    if len(next(iter(files))) == 2 and final > 1:
        return {(rank[0], 0, rank[1]): file for rank, file in files.items()}
    padded = {(*rank, 0, 0)[:3]: file for rank, file in files.items()}
    return {(tensor, pipeline, expert): file for (tensor, pipeline, expert), file in padded.items()}


def _file(folder: Path) -> _File:
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has neither {' nor '.join(_FILES)}: copy the checkpoint again")
    state = read_torch(path)
    if not isinstance(state, dict):
        raise damaged(str(path), "it holds no dict")
    keys = ["model"] if "model" in state else sorted((k for k in state if _CHUNK.fullmatch(str(k))), key=_number)
    models = [state[key] for key in keys]
    if not models or not all(isinstance(model, dict) and all(isinstance(k, str) for k in model) for model in models):
        raise damaged(str(path), "it has no model")
    if any("language_model" in model for model in models):
        raise UserError(
            f"{path} was written by Megatron-LM's models from before Megatron-Core, whose tensors have other names: "
            "convert it with Megatron-LM's tools/checkpoint/convert.py --saver core first"
        )
    args = state.get("args")
    known = args.state if isinstance(args, Inert) and isinstance(args.state, dict) else {}
    return _File(path, known, models, tuple(str(key) for key in state if key not in (*keys, "args")))


def _number(key: str) -> int:
    return int(key.removeprefix("model"))


def _sizes(folder: Path, files: dict[Rank, _File]) -> Rank:
    """(tensor, pipeline, expert) ranks, from the folders and checked against the run's arguments."""
    tensor, pipeline, expert = (1 + max(rank[i] for rank in files) for i in range(3))
    args = files[min(files)].args
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    saved = [args.get(name) for name in names]
    wanted = [
        max(here, size) if isinstance(size, int) else here
        for here, size in zip((tensor, pipeline, expert), saved, strict=True)
    ]
    missing = [rank for rank in product(*map(range, wanted)) if rank not in files]
    if missing:
        layout = " x ".join(map(str, wanted))
        raise UserError(
            f"{folder} has the files of {len(files)} ranks, but its layout (tensor x pipeline x expert) is {layout}: "
            f"among others that of rank {missing[0]} is missing; copy the checkpoint again"
        )
    experts = args.get("expert_tensor_parallel_size")
    if experts not in (None, tensor):
        raise UserError(
            f"{folder}: experts were divided by expert_tensor_parallel_size {experts} and the rest by {tensor}; only "
            "equal sizes can be read. Load it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    return tensor, pipeline, expert


def _first_layers(files: dict[Rank, _File], sizes: Rank) -> dict[tuple[int, int], Firsts]:
    """(stage, chunk) -> the global number of its layer 0, for each block."""
    chunks = len(files[0, 0, 0].models)
    if any(len(file.models) != chunks for file in files.values()):
        raise damaged(str(files[0, 0, 0].path), "other ranks have another number of model chunks")
    first: dict[tuple[int, int], Firsts] = {}
    count = {"decoder": 0, "mtp": 0}
    for chunk, stage in product(range(chunks), range(sizes[1])):
        file = files[0, stage, 0]
        first[stage, chunk] = dict(count)
        for block in count:
            matches = [match for key in file.models[chunk] if (match := _LAYER.match(key)) and match["block"] == block]
            numbers = {int(match["number"]) for match in matches}
            if numbers != set(range(len(numbers))):
                raise damaged(str(file.path), f"its {block} layers are {sorted(numbers)}, which leaves some out")
            count[block] += len(numbers)
    return first


def _shards(
    files: dict[Rank, _File], sizes: Rank, stage: int, chunk: int, first: Firsts
) -> Iterator[tuple[str, list[tuple[Path, Any]]]]:
    """(global name, the value of every tensor rank with its file) of what a chunk of a stage holds."""
    models = {(t, e): files[t, stage, e].models[chunk] for t in range(sizes[0]) for e in range(sizes[2])}
    keys = models[0, 0]
    for (t, e), model in models.items():
        if model.keys() != keys.keys():
            differing = min(model.keys() ^ keys.keys())
            raise damaged(str(files[t, stage, e].path), f"{differing} is not in both it and {files[0, stage, 0].path}")
    local = 1 + max((int(m[2]) for key in keys if (m := _EXPERT.search(key))), default=-1)
    for key in keys:
        if _GROUPED.fullmatch(key):
            raise UserError(
                f"{files[0, stage, 0].path}: {key} holds all experts in one tensor (--moe-grouped-gemm without "
                "Transformer Engine), which cannot be read. Load it with Megatron-LM and save it with --ckpt-format "
                "torch_dist"
            )
        for e in range(sizes[2]) if _EXPERT.search(key) else (0,):
            yield (
                _global(key, first, e * local),
                [(files[t, stage, e].path, models[t, e][key]) for t in range(sizes[0])],
            )


def _global(key: str, layers: Firsts, expert: int) -> str:
    """A key with the layer and the expert counted through the model."""
    key = _LAYER.sub(lambda m: f"{m['block']}.layers.{layers[m['block']] + int(m['number'])}", key, count=1)
    return _EXPERT.sub(lambda m: f"{m[1]}{expert + int(m[2])}", key)


def _join(name: str, shards: Sequence[tuple[Path, Any]], split: Callable[[str], str]) -> Stored:
    """One tensor from the shards of the tensor-parallel ranks."""
    path, lead = shards[0]
    for shard_path, shard in shards:
        if not isinstance(shard, Lazy) or shard.dtype != lead.dtype or len(shard.shape) != len(lead.shape):
            raise damaged(str(shard_path), f"{name} is not what it is in {path}")
        if not shard.contiguous:
            raise UserError(
                f"{shard_path}: the elements of {name} do not lie in order (strides {list(shard.stride)}); only "
                "contiguous tensors can be read. Load and save the file with torch, the tensor made contiguous"
            )
    ((name, _),) = places(Stored(name, lead.dtype, lead.shape, ()))
    how = split(name)
    if how == "none":
        if any(shard.shape != lead.shape for _, shard in shards):
            raise damaged(str(path), f"{name} should be equal on all tensor ranks, but its shapes differ")
        return Stored(name, lead.dtype, lead.shape, (Chunk(str(path), lead.start, (0,) * len(lead.shape), lead.shape),))
    axis, halves = int(how == "row"), 2 if how == "gate_up" else 1
    lengths = [shard.shape[axis] if axis < len(shard.shape) else -1 for _, shard in shards]
    rest = {(*shard.shape[:axis], *shard.shape[axis + 1 :]) for _, shard in shards}
    if len(rest) > 1 or any(length < 0 or length % halves for length in lengths):
        shapes = [list(shard.shape) for _, shard in shards]
        raise damaged(str(path), f"the shards {shapes} of {name} cannot be put together ({how} parallel)")
    whole, chunks, at = sum(lengths), [], 0
    for half in range(halves):
        for (shard_path, shard), length in zip(shards, lengths, strict=True):
            box = (*shard.shape[:axis], length // halves, *shard.shape[axis + 1 :])
            offsets = tuple(at if i == axis else 0 for i in range(len(box)))
            start = shard.start + half * (shard.bytes // halves)
            chunks.append(Chunk(str(shard_path), start, offsets, box))
            at += length // halves
    shape = (*lead.shape[:axis], whole, *lead.shape[axis + 1 :])
    return Stored(name, lead.dtype, shape, tuple(chunks))
