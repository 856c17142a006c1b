"""Legacy mp_rank_* checkpoints: a model cut by a slow splitter comes back whole, bit for bit, in any layout."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.legacy import is_legacy, read_legacy
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES, Stored

LAYERS, EXPERTS = 8, 4
HOW = {
    "linear_qkv.weight": "column",
    "linear_qkv.bias": "column",
    "linear_proj.weight": "row",
    "linear_fc1.weight": "gate_up",
    "linear_fc2.weight": "row",
    "eh_proj.weight": "column",
    "word_embeddings.weight": "vocab",
    "output_layer.weight": "vocab",
}


def split(name: str) -> str:
    """The table of these tests, as a reader's caller would pass its own."""
    return HOW.get(".".join(name.split(".")[-2:]), "none")


@dataclass(frozen=True)
class Layout:
    """Sizes of tensor, pipeline, virtual pipeline and expert parallelism; layers of each chunk in order, else equal."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    layers: tuple[int, ...] = ()
    grouped: bool = False  # Transformer Engine's names

    def stages(self) -> list[tuple[int, int, list[int]]]:
        """(stage, chunk, global layers), in the order of the layers."""
        chunks = self.pipeline * self.virtual
        counts = self.layers or (LAYERS // chunks,) * chunks
        firsts = [sum(counts[:i]) for i in range(chunks)]
        return [
            (i % self.pipeline, i // self.pipeline, list(range(first, first + count)))
            for i, (first, count) in enumerate(zip(firsts, counts, strict=True))
        ]


def model() -> dict[str, torch.Tensor]:
    """A model by canonical names, random bits."""
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    state = {"embedding.word_embeddings.weight": weight(12, 8), "output_layer.weight": weight(12, 8)}
    state["decoder.final_layernorm.weight"] = weight(8)
    for prefix in [f"decoder.layers.{i}." for i in range(LAYERS)] + ["mtp.layers.0.transformer_layer."]:
        state[f"{prefix}input_layernorm.weight"] = weight(8)
        state[f"{prefix}pre_mlp_layernorm.weight"] = weight(8)
        state[f"{prefix}self_attention.linear_qkv.weight"] = weight(16, 8)
        state[f"{prefix}self_attention.linear_qkv.bias"] = weight(16)
        state[f"{prefix}self_attention.linear_proj.weight"] = weight(8, 8)
        state[f"{prefix}self_attention.linear_kv_down_proj.weight"] = weight(6, 8)
        state[f"{prefix}mlp.router.weight"] = weight(EXPERTS, 8)
        state[f"{prefix}mlp.router.expert_bias"] = weight(EXPERTS, dtype=torch.float32)
        for block in [f"mlp.experts.{e}." for e in range(EXPERTS)] + ["mlp.shared_experts."]:
            state[f"{prefix}{block}linear_fc1.weight"] = weight(8, 8)
            state[f"{prefix}{block}linear_fc2.weight"] = weight(8, 4)
    for name in ("enorm", "hnorm", "final_layernorm"):
        state[f"mtp.layers.0.{name}.weight"] = weight(8)
    state["mtp.layers.0.eh_proj.weight"] = weight(8, 16)
    return state


def shard(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One rank's part, row by row."""
    how = split(name)
    if how in ("column", "vocab"):
        wanted = [i for i in range(whole.shape[0]) if i * size // whole.shape[0] == rank]
        return torch.stack([whole[i] for i in wanted])
    if how == "row":
        wanted = [i for i in range(whole.shape[1]) if i * size // whole.shape[1] == rank]
        return torch.stack([whole[:, i] for i in wanted], 1).contiguous()
    if how == "gate_up":
        half = whole.shape[0] // 2
        wanted = [i for i in range(half) if i * size // half == rank]
        return torch.stack([whole[i] for i in wanted] + [whole[half + i] for i in wanted])
    return whole.clone()


def local_name(name: str, layers: Sequence[int], experts: Sequence[int], grouped: bool) -> str | None:
    """How the rank with these layers and experts calls a tensor inside a layer; None where it lacks it."""
    parts = name.split(".")
    if parts[0] == "decoder" and parts[1] == "layers":
        if int(parts[2]) not in layers:
            return None
        parts[2] = str(layers.index(int(parts[2])))
    if "experts" in parts:
        at = parts.index("experts")
        if int(parts[at + 1]) not in experts:
            return None
        number = str(experts.index(int(parts[at + 1])))
        if grouped:
            parts = [*parts[: at + 1], parts[at + 2], f"weight{number}"]
        else:
            parts = [*parts[: at + 1], "local_experts", number, *parts[at + 2 :]]
    name = ".".join(parts)
    return name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight") if grouped else name


def write(
    folder: Path, state: dict[str, torch.Tensor], layout: Layout, *, args: bool = True, shared: bool = False
) -> None:
    """state in Megatron-LM's files. shared: parameters are views of one buffer, as a distributed optimizer's are."""
    stages = layout.stages()
    per_rank = EXPERTS // layout.expert
    for t, p, e in product(range(layout.tensor), range(layout.pipeline), range(layout.expert)):
        experts = list(range(e * per_rank, (e + 1) * per_rank))
        models: dict[int, dict[str, Any]] = {}
        for i, (stage, chunk, layers) in enumerate(stages):
            if stage != p:
                continue
            first, last = i == 0, i == len(stages) - 1
            models[chunk] = part = OrderedDict()
            for name, whole in state.items():
                outer = not name.startswith("decoder.layers.")
                embedding = name.startswith("embedding.")  # which the last stage repeats for multi-token prediction
                if outer and not last and not (first and embedding):
                    continue
                local = local_name(name, layers, experts, layout.grouped)
                if local is not None:
                    part[local] = shard(name, whole, t, layout.tensor)
            if layers:
                part["decoder.layers.0.mlp.router._extra_state"] = None
            if shared:
                pack(part)
        names = ["model"] if layout.virtual == 1 else [f"model{v}" for v in range(layout.virtual)]
        saved: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 5, "rng_state": [torch.arange(3)]}
        saved |= {name: models[v] for v, name in enumerate(names)}
        if args:
            sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
            given = {f"{kind}_model_parallel_size": size for kind, size in sizes.items()}
            saved["args"] = argparse.Namespace(**given, expert_model_parallel_size=layout.expert)
        name = f"mp_rank_{t:02d}"
        name += f"_{p:03d}" if layout.pipeline > 1 else ""
        name += f"_{e:03d}" if layout.expert > 1 else ""
        (folder / name).mkdir(parents=True)
        torch.save(saved, folder / name / ("model_rng.pt" if shared else "model_optim_rng.pt"))


def pack(part: dict[str, Any]) -> None:
    names = [name for name, value in part.items() if value is not None and value.dtype == torch.bfloat16]
    buffer = torch.cat([torch.ones(3, dtype=torch.bfloat16), *(part[name].flatten() for name in names)])
    at = 3
    for name in names:
        size = part[name].numel()
        part[name] = buffer[at : at + size].view(part[name].shape)
        at += size


def assemble(stored: Stored) -> torch.Tensor:
    dtype = getattr(torch, TORCH_NAMES[stored.dtype])
    whole = torch.full(stored.shape, float("nan"), dtype=dtype)
    for chunk in stored.chunks:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.start)
            data = bytearray(file.read(prod(chunk.sizes) * ITEMSIZE[stored.dtype]))
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = torch.frombuffer(data, dtype=dtype).reshape(chunk.sizes)
    return whole


LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(expert=2),
    Layout(tensor=2, expert=4, grouped=True),
    Layout(tensor=2, pipeline=2, expert=2),
    Layout(tensor=2, pipeline=2, expert=2, grouped=True),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=4, virtual=2, tensor=2),
    Layout(pipeline=3, layers=(2, 4, 2)),
    Layout(pipeline=2, virtual=3, layers=(0, 2, 1, 2, 2, 1), expert=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("args", [True, False])
def test_every_layout_comes_back_whole(tmp_path: Path, layout: Layout, args: bool) -> None:
    state = model()
    write(tmp_path / "iter_0000005", state, layout, args=args)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    archive = read_legacy(tmp_path, split)
    assert archive.kind == "legacy"
    assert archive.tensors.keys() == state.keys()
    for name, tensor in state.items():
        found = assemble(archive.tensors[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert {"iteration", "rng_state", "checkpoint_version"} <= set(archive.objects)
    assert "decoder.layers.0.mlp.router._extra_state" in archive.objects
    if layout.tensor == 2:
        assert len(archive.tensors["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"].chunks) == 4


@pytest.mark.parametrize("first", [None, 4])
@pytest.mark.parametrize(("pipeline", "virtual"), [(2, None), (4, None), (2, 2), (4, 2)])
def test_the_order_of_layers_is_megatrons(pipeline: int, virtual: int | None, first: int | None) -> None:
    """What `Layout.stages` assumes."""
    layers = 8 if first is None else 4 + 2 * (pipeline - 1)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=first,
        pipeline_dtype=torch.float32,
    )
    per_stage = [first or layers // pipeline, *[2 if first else layers // pipeline] * (pipeline - 1)]
    counts = tuple(count // (virtual or 1) for count in per_stage) * (virtual or 1)
    for stage, chunk, numbers in Layout(pipeline=pipeline, virtual=virtual or 1, layers=counts).stages():
        assert get_transformer_layer_offset(config, chunk if virtual else None, stage) == numbers[0]


def test_views_of_one_buffer(tmp_path: Path) -> None:
    state = model()
    write(tmp_path, state, Layout(tensor=2, pipeline=2), shared=True)
    archive = read_legacy(tmp_path, split)
    for name, tensor in state.items():
        assert torch.equal(assemble(archive.tensors[name]), tensor), name


def test_which_folders_are_legacy(tmp_path: Path) -> None:
    assert not is_legacy(tmp_path)
    assert not is_legacy(tmp_path / "absent")
    write(tmp_path, model(), Layout())
    assert is_legacy(tmp_path)


def test_a_tied_output_layer_is_the_embedding(tmp_path: Path) -> None:
    state = model()
    state["output_layer.weight"] = state["embedding.word_embeddings.weight"]
    write(tmp_path, state, Layout(pipeline=2))
    for folder in tmp_path.iterdir():
        path = folder / "model_optim_rng.pt"
        saved = torch.load(path, weights_only=False)
        saved["args"].untie_embeddings_and_output_weights = False
        torch.save(saved, path)
    assert state.keys() - read_legacy(tmp_path, split).tensors.keys() == {"output_layer.weight"}


@pytest.mark.parametrize("missing", ["mp_rank_00_001_001", "mp_rank_01_000_000", "mp_rank_00_000_000"])
def test_a_missing_rank(tmp_path: Path, missing: str) -> None:
    write(tmp_path, model(), Layout(tensor=2, pipeline=2, expert=2), args=False)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    rank = tuple(int(n) for n in missing.split("_")[2:])
    with pytest.raises(UserError, match=rf"7 ranks.*is 2 x 2 x 2.*\({', '.join(map(str, rank))}\) is missing"):
        read_legacy(tmp_path, split)


@pytest.mark.parametrize(
    ("kind", "last"), [("tensor", "mp_rank_01_*"), ("pipeline", "mp_rank_*_001"), ("expert", "*_001")]
)
def test_all_files_of_the_last_rank_missing(tmp_path: Path, kind: str, last: str) -> None:
    layout = Layout(tensor=2, expert=2) if kind == "expert" else Layout(tensor=2, pipeline=2)
    write(tmp_path, model(), layout)
    for folder in list(tmp_path.glob(last)):
        folder.rename(folder.with_name(f"gone_{folder.name}"))
    with pytest.raises(UserError, match="is missing"):
        read_legacy(tmp_path, split)


def change(folder: Path, key: str, value: Any) -> None:
    """Put another value into the model of one file; None removes the key."""
    path = folder / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False)
    if value is None:
        del saved["model"][key]
    else:
        saved["model"][key] = value
    torch.save(saved, path)


BAD = [
    (
        "decoder.layers.1.mlp.router.weight",
        torch.zeros(5, 8, dtype=torch.bfloat16),
        "should be equal on all tensor ranks",
    ),
    ("decoder.layers.1.mlp.router.weight", torch.zeros(4, 8), "is not what it is in"),
    (
        "decoder.layers.1.self_attention.linear_proj.weight",
        torch.zeros(9, 4, dtype=torch.bfloat16),
        "cannot be put together",
    ),
    (
        "decoder.layers.1.self_attention.linear_proj.weight",
        torch.zeros(4, 8, dtype=torch.bfloat16).t(),
        "do not lie in order",
    ),
    (
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        torch.zeros(3, 8, dtype=torch.bfloat16),
        "cannot be put together",
    ),
    ("decoder.layers.1.mlp.router.weight", None, "is not in both it and"),
    ("decoder.layers.1.unknown", torch.zeros(1), "is not in both it and"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_shards_that_do_not_fit(tmp_path: Path, key: str, value: Any, message: str) -> None:
    write(tmp_path, model(), Layout(tensor=2))
    change(tmp_path / "mp_rank_01", key, value)
    with pytest.raises(UserError, match=message):
        read_legacy(tmp_path, split)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    for saved, message in (
        ({"model": {"language_model": {}}}, "before Megatron-Core"),
        ({"model": {"decoder.layers.0.mlp.experts.weight1": torch.zeros(2)}}, "all experts in one tensor"),
        ({"model": {"decoder.layers.1.mlp.router.weight": torch.zeros(2)}}, r"layers are \[1\], which leaves some out"),
        ({"optimizer": {}}, "has no model"),
        ([1], "holds no dict"),
        ({"model": {}, "args": argparse.Namespace(expert_tensor_parallel_size=2)}, "expert_tensor_parallel_size 2"),
    ):
        torch.save(saved, path)
        with pytest.raises(UserError, match=message):
            read_legacy(tmp_path, split)
    path.unlink()
    with pytest.raises(UserError, match=r"neither model_optim_rng\.pt nor model_rng\.pt"):
        read_legacy(tmp_path, split)
    path.parent.rmdir()
    with pytest.raises(UserError, match="no folder like mp_rank_00"):
        read_legacy(tmp_path, split)
