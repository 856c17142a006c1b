"""Megatron's spellings of a tensor: every one is read as the same name, and what is written is read back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.convert import origin
from megatron_r1.convert.conversion import Conversion, import_conversion, run
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.exporting import export_plan
from megatron_r1.convert.formats import torch_dist
from megatron_r1.convert.formats.names import ALIASES, Place, Spec, Spelling, parse, places, shard_key, spell
from megatron_r1.convert.plan import MegatronSource
from megatron_r1.convert.storage import ITEMSIZE, Archive, Chunk, Stored
from megatron_r1.model.presets import load_architecture
from tests.reference.synthetic_hf import write_family

LAYER = "decoder.layers.7."
# Keys as Megatron-Core 0.16.1 writes them -> (canonical name with {} for stacked indices, stacked axes, half).
KEYS: dict[str, tuple[str, int, int | None]] = {
    "embedding.word_embeddings.weight": ("embedding.word_embeddings.weight", 0, None),
    "output_layer.weight": ("output_layer.weight", 0, None),
    "decoder.final_layernorm.weight": ("decoder.final_layernorm.weight", 0, None),
    # Homogeneous layers are stacked, others carry their number.
    "decoder.layers.self_attention.linear_proj.weight": (
        "decoder.layers.{}.self_attention.linear_proj.weight",
        1,
        None,
    ),
    "decoder.layers.7.self_attention.linear_proj.weight": (f"{LAYER}self_attention.linear_proj.weight", 0, None),
    # Transformer Engine's fused norms.
    f"{LAYER}self_attention.linear_qkv.layer_norm_weight": (f"{LAYER}input_layernorm.weight", 0, None),
    f"{LAYER}self_attention.linear_q_up_proj.layer_norm_weight": (f"{LAYER}self_attention.q_layernorm.weight", 0, None),
    f"{LAYER}self_attention.linear_kv_up_proj.layer_norm_weight": (
        f"{LAYER}self_attention.kv_layernorm.weight",
        0,
        None,
    ),
    f"{LAYER}mlp.linear_fc1.layer_norm_weight": (f"{LAYER}pre_mlp_layernorm.weight", 0, None),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": ("decoder.layers.{}.pre_mlp_layernorm.weight", 1, None),
    f"{LAYER}self_attention.q_layernorm.weight": (f"{LAYER}self_attention.q_layernorm.weight", 0, None),
    # Experts: stacked, one by one, as modules' own names have them.
    f"{LAYER}mlp.experts.experts.linear_fc1.weight": (f"{LAYER}mlp.experts.{{}}.linear_fc1.weight", 1, None),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (
        "decoder.layers.{}.mlp.experts.{}.linear_fc2.weight",
        2,
        None,
    ),
    f"{LAYER}mlp.experts.experts.12.linear_fc2.weight": (f"{LAYER}mlp.experts.12.linear_fc2.weight", 0, None),
    f"{LAYER}mlp.experts.local_experts.12.linear_fc1.weight": (f"{LAYER}mlp.experts.12.linear_fc1.weight", 0, None),
    "decoder.layers.mlp.experts.local_experts.12.linear_fc1.weight": (
        "decoder.layers.{}.mlp.experts.12.linear_fc1.weight",
        1,
        None,
    ),
    f"{LAYER}mlp.experts.linear_fc2.weight12": (f"{LAYER}mlp.experts.12.linear_fc2.weight", 0, None),
    f"{LAYER}mlp.shared_experts.linear_fc1.weight": (f"{LAYER}mlp.shared_experts.linear_fc1.weight", 0, None),
    f"{LAYER}mlp.router.expert_bias": (f"{LAYER}mlp.router.expert_bias", 0, None),
    # Halves of gated layers.
    f"{LAYER}mlp.linear_fc1.weight_w": (f"{LAYER}mlp.linear_fc1.weight", 0, 0),
    f"{LAYER}mlp.linear_fc1.weight_v": (f"{LAYER}mlp.linear_fc1.weight", 0, 1),
    f"{LAYER}mlp.experts.experts.3.linear_fc1.weight_v": (f"{LAYER}mlp.experts.3.linear_fc1.weight", 0, 1),
    "decoder.layers.mlp.linear_fc1.weight_w": ("decoder.layers.{}.mlp.linear_fc1.weight", 1, 0),
    # Multi-token prediction, in both spellings.
    "mtp.layers.0.eh_proj.weight": ("mtp.layers.0.eh_proj.weight", 0, None),
    "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight": (
        "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight",
        0,
        None,
    ),
    "mtp.layers.0.mtp_model_layer.self_attention.linear_kv_up_proj.layer_norm_weight": (
        "mtp.layers.0.transformer_layer.self_attention.kv_layernorm.weight",
        0,
        None,
    ),
    "mtp.layers.1.mtp_model_layer.mlp.experts.experts.linear_fc1.weight": (
        "mtp.layers.1.transformer_layer.mlp.experts.{}.linear_fc1.weight",
        1,
        None,
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_what_a_key_means(key: str) -> None:
    found = parse(key)
    assert (found.template, found.axes, found.half) == KEYS[key]


def test_stacked_indices_fill_the_name_in_order() -> None:
    parsed = parse("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    assert parsed.canonical((4, 17)) == "decoder.layers.4.mlp.experts.17.linear_fc1.weight"
    assert parse("output_layer.weight").canonical(()) == "output_layer.weight"


@pytest.mark.parametrize("name", ["{0.__class__}.x", "{1}.x", "{", "a}{b.weight", "{}"])
def test_braces_in_a_key_are_only_characters(name: str) -> None:
    assert parse(f"vision.{name}").canonical(()) == f"vision.{name}"
    assert parse(f"decoder.layers.3.{name}").canonical(()) == f"decoder.layers.3.{name}"
    assert parse(f"decoder.layers.{name}").canonical((7,)) == f"decoder.layers.7.{name}"
    stored = Stored(f"decoder.layers.{name}", "BF16", (2, 3), ())
    assert [found for found, _ in places(stored)] == [f"decoder.layers.{layer}.{name}" for layer in range(2)]


def test_a_stacked_tensor_holds_every_layer_and_expert() -> None:
    stored = Stored("decoder.layers.mlp.experts.experts.linear_fc2.weight", "BF16", (3, 2, 8, 16), ())
    found = dict(places(stored))
    assert found == {
        f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight": Place(stored, (layer, expert))
        for layer in range(3)
        for expert in range(2)
    }
    half = Stored("decoder.layers.5.mlp.linear_fc1.weight_v", "BF16", (8, 16), ())
    assert dict(places(half)) == {"decoder.layers.5.mlp.linear_fc1.weight": Place(half, (), 1)}


FUSED = {canonical: fused for fused, canonical in ALIASES.items()}


@pytest.mark.parametrize("layers", [None, 9])
@pytest.mark.parametrize("fused", [{}, FUSED])
def test_what_is_spelled_is_read_back(layers: int | None, fused: dict[str, str]) -> None:
    names = {parse(key).canonical((7, 5)) for key in KEYS if parse(key).axes in (0, 2)}
    assert len(names) > 15
    for name in names:
        spelling = spell(name, fused, layers, 24)
        parsed = parse(spelling.key)
        assert parsed.canonical(spelling.lead) == name
        assert parsed.axes == len(spelling.lead) == len(spelling.stack)


def test_how_names_are_spelled() -> None:
    norm = "decoder.layers.7.self_attention.kv_layernorm.weight"
    fused = "self_attention.linear_kv_up_proj.layer_norm_weight"
    assert spell(norm, FUSED, None, 0) == Spelling(f"decoder.layers.7.{fused}", (), ())
    assert spell(norm, {}, None, 0) == Spelling(norm, (), ())
    expert = "decoder.layers.7.mlp.experts.3.linear_fc1.weight"
    stacked = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert spell(expert, FUSED, 9, 24) == Spelling(stacked, (7, 3), (9, 24))
    # Prediction layers are never stacked; their experts are.
    predicting = "mtp.layers.0.transformer_layer.mlp.experts.3.linear_fc2.weight"
    one = "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight"
    assert spell(predicting, FUSED, 9, 24) == Spelling(one, (3,), (24,))
    assert spell("output_layer.weight", FUSED, 9, 24) == Spelling("output_layer.weight", (), ())


def test_names_of_objects_say_where_they_are() -> None:
    """Against keys of a checkpoint that Megatron-Core 0.16.1 wrote."""
    alone = "decoder.layers.0.self_attention.linear_proj._extra_state"
    assert shard_key(alone, (), ()) == f"{alone}/shard_0_1"
    stacked = "decoder.layers.mlp.experts.experts.linear_fc1._extra_state"
    assert shard_key(stacked, (2, 5), (4, 8)) == f"{stacked}/shard_2.5_4.8"


# Below: checkpoints in the spellings of other Megatron versions and settings, made from an import by renaming and
# cutting its entries. The bytes stay where they are.

Edit = Callable[[Stored], Iterable[Stored]]


def part(stored: Stored, name: str, axis: int, first: int, size: int, *, keep: bool) -> Stored:
    """Elements [first, first + size) along a leading axis as a tensor; keep: else the axis is dropped (size 1).

    The chunks of an import are 1 long along the stacked axes, or begin and end at the border of gate and up.
    """
    chunks = []
    for chunk in stored.chunks:
        if first <= chunk.offsets[axis] < first + size:
            assert chunk.offsets[axis] + chunk.sizes[axis] <= first + size
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            offsets[axis] -= first
            if not keep:
                del offsets[axis], sizes[axis]
            chunks.append(Chunk(chunk.file, chunk.start, tuple(offsets), tuple(sizes)))
    shape = list(stored.shape)
    shape[axis] = size
    if not keep:
        del shape[axis]
    return Stored(name, stored.dtype, tuple(shape), tuple(chunks))


def unstack_layers(stored: Stored) -> Iterator[Stored]:
    if re.match(r"decoder\.layers\.\D", stored.name):
        for i in range(stored.shape[0]):
            yield part(stored, stored.name.replace("layers.", f"layers.{i}."), 0, i, 1, keep=False)
    else:
        yield stored


def unstack_experts(spelling: str) -> Edit:
    """spelling: of an expert's tensor; `{}` is its number, `*` is `linear_fc1.weight` or `linear_fc2.weight`."""

    def edit(stored: Stored) -> Iterator[Stored]:
        for one in unstack_layers(stored):
            head, found, rest = one.name.partition("experts.experts.")
            if not found:
                yield one
                continue
            for e in range(one.shape[0]):
                yield part(one, head + spelling.format(e).replace("*", rest), 0, e, 1, keep=False)

    return edit


def halve(stored: Stored) -> Iterator[Stored]:
    """As `singleton_local_shards` writes gated layers."""
    for one in unstack_experts("experts.experts.{}.*")(stored):
        if one.name.endswith("linear_fc1.weight"):
            rows = one.shape[0] // 2
            yield part(one, f"{one.name}_w", 0, 0, rows, keep=True)
            yield part(one, f"{one.name}_v", 0, rows, rows, keep=True)
        else:
            yield one


def renamed(*pairs: tuple[str, str]) -> Edit:
    def edit(stored: Stored) -> Iterator[Stored]:
        name = stored.name
        for old, new in pairs:
            if name.endswith(f".{old}") or (old.endswith(".") and f".{old}" in name):
                name = name.replace(f".{old}", f".{new}")
                break
        yield dataclasses.replace(stored, name=name)

    return edit


def vocabulary_padded(stored: Stored) -> Iterator[Stored]:
    """12 rows behind the vocabulary, of whatever bytes, in a chunk of their own."""
    if stored.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows, width = stored.shape
        junk = Chunk(stored.chunks[0].file, 0, (rows, 0), (12, width))
        yield Stored(stored.name, stored.dtype, (rows + 12, width), (*stored.chunks, junk))
    else:
        yield stored


def among_others(stored: Stored) -> Iterator[Stored]:
    """With what training saves beside the model."""
    yield stored
    for prefix in ("optimizer.state.exp_avg.", "reference."):
        yield dataclasses.replace(stored, name=prefix + stored.name)


def cut(axis: int, pieces: int) -> Edit:
    """Chunks cut along the rows, as tensor or expert parallelism leaves them; the bytes of rows lie together."""

    def edit(stored: Stored) -> Iterator[Stored]:
        chunks = []
        for chunk in stored.chunks:
            at = len(chunk.sizes) - axis
            if at < 0 or any(size != 1 for size in chunk.sizes[:at]):
                chunks.append(chunk)
                continue
            whole, step = chunk.sizes[at], -(-chunk.sizes[at] // pieces)
            inner = ITEMSIZE[stored.dtype]
            for size in chunk.sizes[at + 1 :]:
                inner *= size
            for first in range(0, whole, step):
                offsets, sizes = list(chunk.offsets), list(chunk.sizes)
                offsets[at] += first
                sizes[at] = min(step, whole - first)
                chunks.append(Chunk(chunk.file, chunk.start + first * inner, tuple(offsets), tuple(sizes)))
        yield dataclasses.replace(stored, chunks=tuple(reversed(chunks)))

    return edit


SPELLINGS: dict[str, Edit] = {
    "unfused norms": renamed(*ALIASES.items()),
    **{f"fused norm {fused}": renamed((plain, fused)) for fused, plain in ALIASES.items()},
    "layers one by one": unstack_layers,
    "singleton experts": unstack_experts("experts.experts.{}.*"),
    "local experts": unstack_experts("experts.local_experts.{}.*"),
    "grouped experts": unstack_experts("experts.*{}"),
    "halves of gated layers": halve,
    "newer prediction layers": renamed(("transformer_layer.", "mtp_model_layer.")),
    "padded vocabulary": vocabulary_padded,
    "a training checkpoint": among_others,
    "chunks of rows": cut(2, 3),
    "chunks of vectors": cut(1, 3),
}


def respelled(folder: Path, edit: Edit) -> Archive:
    archive = torch_dist.read_torch_dist(folder)
    edited = [new for stored in archive.tensors.values() for new in edit(stored)]
    assert len({stored.name for stored in edited}) == len(edited)
    return dataclasses.replace(archive, tensors={stored.name: stored for stored in edited})


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Megatron checkpoint of every kind of architecture, by family and spec; `hf` beside it is where it came from."""
    root = tmp_path_factory.mktemp("imports")
    made = {}
    cases: tuple[tuple[Spec, str], ...]
    cases = (("te", "deepseek_v3"), ("local", "deepseek_v3"), ("te", "qwen2"), ("te", "qwen3_moe"))
    for spec, family in cases:
        made[f"{family} {spec}"] = folder = root / f"{family} {spec}" / "megatron"
        write_family(folder.parent / "hf", family, shards=3)
        run(import_conversion(folder.parent / "hf", spec=spec), folder)
    return made


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling: str, imports: dict[str, Path], tmp_path: Path) -> None:
    changed = set()
    for family, folder in imports.items():
        archive = respelled(folder, SPELLINGS[spelling])
        if archive.tensors != torch_dist.read_torch_dist(folder).tensors:
            changed.add(family)
        table, known = Correspondence(load_architecture(folder / "hf")), origin.of_folder(folder / "hf")
        source = MegatronSource(archive, table)
        made = export_plan(source, known, dtype=None, scales="fp32", shard_bytes=10**9)
        run(Conversion("export", folder, made.plan, {}, {}), tmp_path / family)
        assert_same_shards(tmp_path / family, folder.parent / "hf")
    assert changed, "the spelling is another one for some architecture"


def assert_same_shards(found: Path, expected: Path) -> None:
    files = {folder: {f.name: f.read_bytes() for f in folder.glob("*.safetensors")} for folder in (found, expected)}
    assert files[found].keys() == files[expected].keys()
    assert [name for name, data in files[expected].items() if files[found][name] != data] == []


def test_weights_in_more_than_one_spelling_are_refused(imports: dict[str, Path]) -> None:
    folder = imports["qwen2 te"]

    def twice(stored: Stored) -> Iterator[Stored]:
        yield stored
        if "linear_proj" in stored.name:
            yield from unstack_layers(stored)

    with pytest.raises(UserError, match="more than once"):
        MegatronSource(respelled(folder, twice), Correspondence(load_architecture(folder / "hf")))
