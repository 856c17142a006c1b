"""The planner: every element of every tensor is used once, and what is missing, foreign or misshapen is named."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config.errors import UserError
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.exporting import export_plan
from megatron_r1.convert.importing import ImportPlan, import_plan
from megatron_r1.convert.inspecting import planned_hf, planned_megatron
from megatron_r1.convert.origin import Origin
from megatron_r1.convert.plan import (
    HfSource,
    MegatronSource,
    OutputFile,
    Piece,
    Target,
    check_coverage,
    check_used,
    one_dtype,
)
from megatron_r1.convert.storage import ITEMSIZE, Archive, Chunk, Stored
from tests.reference.synthetic_hf import FAMILIES

NOWHERE = Path("(nowhere)")
Change = Callable[[dict[str, Stored]], None]


def table(family: str = "deepseek_v3", *, predictions: bool = True, **changed: Any) -> Correspondence:
    return Correspondence({**FAMILIES[family], **changed}, predictions=predictions)


def edited(archive: Archive, change: Change) -> Archive:
    tensors = dict(archive.tensors)
    change(tensors)
    return replace(archive, tensors=tensors)


def imported(family: str, dtype: str = "bf16", **options: Any) -> ImportPlan:
    made = table(family)
    settings: dict[str, Any] = {"spec": "te", "dtype": None, "file_bytes": 10**9, **options}
    return import_plan(HfSource(planned_hf(made, dtype), made), **settings)


def covered(file: OutputFile) -> bool:
    """Whether the parts of a file lie one behind another from its first byte to its last."""
    spans = []
    for part in file.parts:
        if isinstance(part.content, bytes):
            spans.append((part.at, part.at + len(part.content)))
            continue
        scales = prod(part.content.scale_shape()) * 4
        spans.append((part.at, part.at + (scales if part.only_scales else part.content.bytes)))
        if part.scale_at is not None:
            spans.append((part.scale_at, part.scale_at + scales))
    spans.sort()
    return [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), file.size]


@pytest.mark.parametrize("file_bytes", [1, 50_000, 10**9])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2-tied", "qwen3_moe"])
def test_parts_fill_their_files(family: str, file_bytes: int) -> None:
    made = imported(family, file_bytes=file_bytes)
    assert all(covered(file) for file in made.plan.files)
    source = MegatronSource(planned_megatron(made), table(family))
    plan = export_plan(source, Origin(NOWHERE, b"{}"), dtype=None, scales="fp32", shard_bytes=file_bytes).plan
    assert all(covered(file) for file in plan.files)


@given(seed=st.integers(0, 2**32), files=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_scales_in_other_files_than_their_weights_are_planned(seed: int, files: int) -> None:
    """As a released index may have it: any tensor in any file."""
    made, draw = table(), random.Random(seed)
    hf = planned_hf(made, "fp8")
    where = {name: f"model-{draw.randrange(files)}.safetensors" for name in hf.tensors}
    dtypes = {name: tensor.dtype for name, tensor in hf.tensors.items()}
    source = MegatronSource(
        planned_megatron(import_plan(HfSource(hf, made), spec="te", dtype=None, file_bytes=10**9)), made
    )
    found = export_plan(
        source, Origin(NOWHERE, b"{}", dtypes, weight_map=where), dtype=None, scales="fp32", shard_bytes=1
    )
    assert all(covered(file) for file in found.plan.files)
    assert {tensor.name: shard.name for shard in found.shards for tensor in shard.tensors} == where
    counted = [target.name for file in found.plan.files for target in file.targets]
    assert sorted(counted) == sorted(made.hf_names), "every tensor is one target"


def read_ranges(plan_files: Any) -> dict[str, list[tuple[int, int]]]:
    """file -> byte ranges that are read, rows one by one."""
    found: dict[str, list[tuple[int, int]]] = {}
    for piece in (piece for file in plan_files for target in file.targets for piece in target.pieces):
        width = piece.cols * ITEMSIZE[piece.dtype]
        for row in range(piece.rows):
            start = piece.start + row * piece.stride
            found.setdefault(piece.file, []).append((start, start + width))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_import_reads_every_byte_once(family: str) -> None:
    """Of all tensors but the prediction layer's copies."""
    made = table(family)
    archive = planned_hf(made, "bf16")
    plan = import_plan(HfSource(archive, made), spec="te", dtype=None, file_bytes=10**9).plan
    (spans,) = read_ranges(plan.files).values()
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    copies = sum(archive.tensors[name].bytes for name in made.copies.keys() - made.optional)
    assert sum(end - begin for begin, end in spans) == archive.bytes - copies
    assert {second.name for _, second in plan.equal} == set(made.copies) - made.optional


def test_an_export_reads_every_byte_of_the_model_once_but_what_is_copied() -> None:
    made, plan = table(), imported("deepseek_v3")
    archive = planned_megatron(plan)
    out = export_plan(
        MegatronSource(archive, made), Origin(NOWHERE, b"{}"), dtype=None, scales="fp32", shard_bytes=10**9
    )
    spans = sorted(span for found in read_ranges(out.plan.files).values() for span in found)
    embeddings = sum(archive.tensors[n].bytes for n in ("embedding.word_embeddings.weight", "output_layer.weight"))
    assert sum(end - begin for begin, end in spans) == archive.bytes + embeddings


# What a Hugging Face checkpoint can have wrong -> what the message says.
def _without(start: str) -> Change:
    def change(tensors: dict[str, Stored]) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return change


def _with(*names: str, dtype: str = "BF16", shape: tuple[int, ...] = (4,)) -> Change:
    chunks = (Chunk("f", 0, (0,) * len(shape), shape),)
    return lambda tensors: tensors.update({name: Stored(name, dtype, shape, chunks) for name in names})


def _shaped(name: str, shape: tuple[int, ...]) -> Change:
    return lambda tensors: tensors.update({name: replace(tensors[name], shape=shape)})


HF_MISTAKES: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (
        _without("model.layers.0.mlp.down_proj.weight"),
        r"1 tensors are missing: model\.layers\.0\.mlp",
    ),
    "an expert is missing": (
        _without("model.layers.1.mlp.experts.3."),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight.*Is config\.json the one",
    ),
    "the prediction layer is missing": (_without("model.layers.2."), "prediction layer is not in .*--no-mtp"),
    "a tensor is foreign": (_with("model.vision.weight"), r"not of this model: model\.vision\.weight.*Is config\.json"),
    "an expert too many": (_with("model.layers.1.mlp.experts.8.up_proj.weight"), r"not of this model: .*experts\.8"),
    "another shape": (
        _shaped("lm_head.weight", (512, 256)),
        r"lm_head\.weight is \[512, 256\] instead of \[500, 256\]",
    ),
    "FP8 without scales": (
        _without("model.layers.0.mlp.down_proj.weight_scale_inv"),
        r"model\.layers\.0\.mlp\.down_proj\.weight are FP8 without their `\*_scale_inv`",
    ),
    "scales without their tensor's FP8": (
        _with("model.norm.weight_scale_inv", dtype="F32", shape=(1, 1)),
        r"not of this model: model\.norm\.weight_scale_inv",
    ),
    "integers": (
        _with("model.norm.weight", dtype="I8", shape=(256,)),
        r"model\.norm\.weight is I8; weights may be BF16",
    ),
    "scales that are integers": (
        _with("model.layers.0.mlp.down_proj.weight_scale_inv", dtype="I32", shape=(2, 3)),
        r"down_proj\.weight_scale_inv is I32; block scales may be F32",
    ),
    "scales of another shape": (
        _shaped("model.layers.0.mlp.down_proj.weight_scale_inv", (1, 2)),
        r"down_proj\.weight_scale_inv is \[1, 2\] instead of \[2, 3\]",
    ),
}


@pytest.mark.parametrize("mistake", HF_MISTAKES)
def test_a_hugging_face_checkpoint_that_does_not_fit_is_refused(mistake: str) -> None:
    change, message = HF_MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        HfSource(edited(planned_hf(table(), "fp8"), change), table())


def test_what_may_be_missing_or_superfluous() -> None:
    """Copies may be left out, buffers of old checkpoints and a tied head may be there; the plan says what it drops,
    and what has to equal what.
    """
    made = table("qwen2-tied")
    extra = edited(planned_hf(made, "bf16"), _with("lm_head.weight", shape=(500, 256)))
    extra = edited(extra, _with("model.layers.0.self_attn.rotary_emb.inv_freq"))
    plan = import_plan(HfSource(extra, made), spec="te", dtype=None, file_bytes=10**9).plan
    assert plan.dropped == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer of old checkpoints, computed from rope_theta",
    }
    assert [(first.name, second.name) for first, second in plan.equal] == [
        ("model.embed_tokens.weight", "lm_head.weight")
    ]
    few = edited(planned_hf(table(), "bf16"), _without("model.layers.2.embed_tokens"))
    few = edited(few, _without("model.layers.2.shared_head.head"))
    assert not import_plan(HfSource(few, table()), spec="te", dtype=None, file_bytes=10**9).plan.equal


def test_prediction_layers_left_out_are_listed_with_their_scales() -> None:
    made = table(predictions=False)
    plan = import_plan(HfSource(planned_hf(table(), "fp8"), made), spec="te", dtype=None, file_bytes=10**9).plan
    assert set(plan.dropped.values()) == {"multi-token prediction is left out"}
    assert set(plan.dropped) == {n for n in planned_hf(table(), "fp8").tensors if n.startswith("model.layers.2.")}


def _stored_as(dtype: str, *names: str) -> Change:
    return lambda tensors: tensors.update({name: replace(tensors[name], dtype=dtype) for name in names})


MIXTURES = {
    "fused": ("qwen2", "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    "gate and up": ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
    "layers": ("llama", "model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    "experts": (
        "deepseek_v3",
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.layers.1.mlp.experts.0.down_proj.weight",
    ),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_dtypes_that_differ_under_one_key_need_a_choice(mixture: str) -> None:
    """Both tensors are named; with a dtype for all the plan has one dtype a key."""
    family, odd, other = MIXTURES[mixture]
    made = table(family)
    archive = edited(planned_hf(made, "bf16"), _stored_as("F32", odd))
    with pytest.raises(UserError, match=rf"{re.escape(other)} is BF16, {re.escape(odd)} is F32\. .*--dtype"):
        import_plan(HfSource(archive, made), spec="te", dtype=None, file_bytes=10**9)
    plan = import_plan(HfSource(archive, made), spec="te", dtype="BF16", file_bytes=10**9)
    assert {tensor.dtype for tensor in plan.tensors} <= {"BF16", "F32"}


def test_fp8_and_bf16_may_be_fused() -> None:
    """Both become BF16."""
    made, odd = table(), "model.layers.1.mlp.experts.3.up_proj.weight"
    archive = edited(planned_hf(made, "fp8"), _stored_as("BF16", odd))
    archive = edited(archive, _without(f"{odd}_scale_inv"))
    plan = import_plan(HfSource(archive, made), spec="te", dtype=None, file_bytes=10**9)
    assert {t.dtype for t in plan.tensors if not t.key.endswith("expert_bias")} == {"BF16"}


def test_halves_of_two_dtypes_need_a_choice_on_export() -> None:
    """A gated layer whose halves were saved apart; only a whole that is one tensor on the other side matters."""
    with pytest.raises(UserError, match=r"a is BF16, b is F32\. .*--dtype"):
        one_dtype("x", {"a": "BF16", "b": "F32"})
    assert one_dtype("x", {"a": "BF16", "b": "BF16"}) == "BF16"


FC1 = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
MEGATRON_MISTAKES: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (_without("decoder.final_layernorm"), r"1 tensors are missing: decoder\.final_layernorm"),
    "a tensor is foreign": (_with("decoder.layers.0.extra.weight"), r"not of this model: decoder\.layers\.0\.extra"),
    "another model's tensor": (_with("vision_model.patch.weight"), r"not of this model: vision_model\.patch\.weight"),
    "nearly an optimizer": (_with("optimizers.weight"), r"not of this model: optimizers\.weight"),
    "a wrapped model": (_with("module.output_layer.weight"), r"not of this model: module\.output_layer\.weight"),
    "integers": (
        _with("decoder.final_layernorm.weight", dtype="I32", shape=(256,)),
        r"decoder\.final_layernorm\.weight is I32; weights may be BF16, F16, F32",
    ),
    "a layer too many": (_with("decoder.layers.2.input_layernorm.weight"), r"not of this model: decoder\.layers\.2\."),
    "no prediction layers": (_without("mtp."), "prediction layer is not in .*--no-mtp"),
    "another shape": (
        _shaped("decoder.final_layernorm.weight", (250,)),
        r"final_layernorm\.weight is \[250\] instead of \[256\]",
    ),
    "a vocabulary too small": (
        _shaped("output_layer.weight", (499, 256)),
        r"output_layer\.weight is \[499, 256\] instead of \[500, 256\]",
    ),
    "another width": (_shaped("output_layer.weight", (512, 128)), r"is \[512, 128\] instead of \[500, 256\]"),
    "experts too few": (_shaped(FC1, (7, 320, 256)), r"missing: decoder\.layers\.1\.mlp\.experts\.7\.linear_fc1"),
    "experts too many": (_shaped(FC1, (9, 320, 256)), r"not of this model: .*experts\.8\.linear_fc1"),
    "a reward model": (_with("scalar_head.weight"), "holds a reward model"),
    "two spellings of one": (
        _with("decoder.layers.0.pre_mlp_layernorm.weight", shape=(256,)),
        r"decoder\.layers\.0\.pre_mlp_layernorm\.weight are there more than once",
    ),
    "one half twice": (
        _with("decoder.layers.0.mlp.linear_fc1.weight_w", shape=(320, 256)),
        r"decoder\.layers\.0\.mlp\.linear_fc1\.weight",
    ),
}


@pytest.mark.parametrize("mistake", MEGATRON_MISTAKES)
def test_a_megatron_checkpoint_that_does_not_fit_is_refused(mistake: str) -> None:
    change, message = MEGATRON_MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        MegatronSource(edited(planned_megatron(imported("deepseek_v3")), change), table())


def test_what_training_saves_beside_the_model_is_dropped() -> None:
    """Each kind under its own reason; names as Megatron-Core 0.16.1 and this project write them."""
    beside = {
        "optimizer.state.exp_avg.output_layer.weight": "optimizer state",
        "chained_1.optimizer.state.fp32_param.decoder.layers.mlp.linear_fc2.weight": "optimizer state",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0": "optimizer state",
        "reference.decoder.final_layernorm.weight": "the KL reference",
        "rng_state": "random states",
        "rng/shard_0_1": "random states",
        "opt_param_scheduler.max_lr": "the schedule of the learning rate",
    }
    source = MegatronSource(edited(planned_megatron(imported("qwen2")), _with(*beside)), table("qwen2"))
    assert source.dropped == beside


def test_unused_elements_are_noticed() -> None:
    source = MegatronSource(planned_megatron(imported("qwen2")), table("qwen2"))
    for name in source.table.hf_names:
        if name != "model.layers.1.self_attn.k_proj.weight":
            source.hf_tensor(name)
    with pytest.raises(UserError, match=r"elements of decoder\.layers\.self_attention\.linear_qkv\.weight are used"):
        check_used(source)
    source.hf_tensor("model.layers.1.self_attn.k_proj.weight")
    check_used(source)


def test_a_chunk_that_is_not_there_leaves_a_hole() -> None:
    archive = planned_megatron(imported("qwen2"))
    stored = archive.tensors["output_layer.weight"]
    holed = edited(archive, lambda t: t.update({stored.name: replace(stored, chunks=())}))
    source = MegatronSource(holed, table("qwen2"))
    with pytest.raises(UserError, match=r"lm_head\.weight: its source holds 0 of its 128000 elements"):
        check_coverage(Target("lm_head.weight", "BF16", (500, 256), source.hf_tensor("lm_head.weight")))


# Boxes: whatever chunks a tensor is stored in, the pieces of a box of it lie where its elements do.


def cuts(draw: random.Random, size: int) -> list[tuple[int, int]]:
    """A split of an axis into (first, size) intervals."""
    inner = sorted(draw.sample(range(1, size), draw.randrange(min(size, 4)))) if size > 1 else []
    bounds = [0, *inner, size]
    return [(a, b - a) for a, b in pairwise(bounds)]


def stored_in_boxes(name: str, value: torch.Tensor, draw: random.Random) -> tuple[Stored, Mapping[str, bytes]]:
    """A float32 tensor in a grid of chunks, each in a file of its own behind a few other bytes, and the files."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in value.shape:
        boxes = [((*o, first), (*s, length)) for o, s in boxes for first, length in cuts(draw, size)]
    chunks, files = [], {}
    for i, (offsets, sizes) in enumerate(boxes):
        box = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        start = draw.randrange(9)
        files[f"{name}.{i}"] = bytes(start) + box.contiguous().numpy().tobytes()
        chunks.append(Chunk(f"{name}.{i}", start, offsets, sizes))
    draw.shuffle(chunks)
    return Stored(name, "F32", tuple(value.shape), tuple(chunks)), files


def made_of(pieces: tuple[Piece, ...], shape: tuple[int, int], files: Mapping[str, bytes]) -> torch.Tensor:
    """The matrix that pieces make; elements that none makes are NaN."""
    made = torch.full(shape, torch.nan)
    for piece in pieces:
        for row in range(piece.rows):
            start = piece.start + row * piece.stride
            data = bytearray(files[piece.file][start : start + piece.cols * 4])
            place = made[piece.row + row, piece.col : piece.col + piece.cols]
            assert place.isnan().all(), "an element is made twice"
            place.copy_(torch.frombuffer(data, dtype=torch.float32))
    return made


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_boxes_of_tensors_in_any_chunks(seed: int) -> None:
    """Gated experts stacked in layers, cut along every axis: rows and columns of the Megatron tensor and the whole of
    the Hugging Face ones, against slices of the values.
    """
    draw = random.Random(seed)
    made = table("qwen3_moe", hidden_size=6, moe_intermediate_size=5, num_experts=3, num_hidden_layers=2)
    dtypes = planned_megatron(
        import_plan(HfSource(planned_hf(made, "fp32"), made), spec="te", dtype=None, file_bytes=10**9)
    )
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    value = torch.arange(2 * 3 * 10 * 6, dtype=torch.float32).view(2, 3, 10, 6)
    stored, files = stored_in_boxes(name, value, draw)
    source = MegatronSource(edited(dtypes, lambda tensors: tensors.update({name: stored})), made)
    layer, expert = draw.randrange(2), draw.randrange(3)
    for half, projection in enumerate(("gate", "up")):
        pieces = source.hf_tensor(f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight")
        assert torch.equal(made_of(pieces, (5, 6), files), value[layer, expert, half * 5 : half * 5 + 5])
        assert [(p.row, p.col) for p in pieces] == sorted((p.row, p.col) for p in pieces)
    entry = made.entries[f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight"]
    first, left = draw.randrange(10), draw.randrange(6)
    rows, cols = range(first, draw.randint(first + 1, 10)), range(left, draw.randint(left + 1, 6))
    found = made_of(source.megatron_box(entry, rows, cols), (len(rows), len(cols)), files)
    assert torch.equal(found, value[layer, expert, rows.start : rows.stop, cols.start : cols.stop])


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_boxes_of_fused_projections_in_any_chunks(seed: int) -> None:
    """Query, key and value out of a stored qkv, and any box of qkv out of stored query, key and value."""
    draw = random.Random(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 3,
        "num_hidden_layers": 1,
    }
    made = table("qwen2", **sizes)
    hf = planned_hf(made, "fp32")
    heads = {"q": 12, "k": 6, "v": 6}
    values = {
        x: torch.randn(rows, 6, generator=torch.Generator().manual_seed(i)) for i, (x, rows) in enumerate(heads.items())
    }
    groups = zip(*(values[x].view(2, -1, 6) for x in "qkv"), strict=True)
    fused = torch.cat([torch.cat(group) for group in groups])
    name = "decoder.layers.self_attention.linear_qkv.weight"
    stored, files = stored_in_boxes(name, fused[None], draw)
    archive = planned_megatron(import_plan(HfSource(hf, made), spec="te", dtype=None, file_bytes=10**9))
    source = MegatronSource(edited(archive, lambda tensors: tensors.update({name: stored})), made)
    for x, value in values.items():
        pieces = source.hf_tensor(f"model.layers.0.self_attn.{x}_proj.weight")
        assert torch.equal(made_of(pieces, (len(value), 6), files), value)
    parts, files = {}, {}
    for x, value in values.items():
        key = f"model.layers.0.self_attn.{x}_proj.weight"
        start = draw.randrange(9)
        files[key] = bytes(start) + value.numpy().tobytes()
        parts[key] = Stored(key, "F32", tuple(value.shape), (Chunk(key, start, (0, 0), tuple(value.shape)),))
    other = HfSource(edited(hf, lambda tensors: tensors.update(parts)), made)
    entry = made.entries["decoder.layers.0.self_attention.linear_qkv.weight"]
    first, left = draw.randrange(24), draw.randrange(6)
    rows, cols = range(first, draw.randint(first + 1, 24)), range(left, draw.randint(left + 1, 6))
    found = made_of(other.megatron_box(entry, rows, cols), (len(rows), len(cols)), files)
    assert torch.equal(found, fused[rows.start : rows.stop, cols.start : cols.stop])
