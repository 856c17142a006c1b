"""Reading and laying out safetensors folders, against what the safetensors library and transformers read and write."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.hf_files import (
    INDEX,
    SINGLE,
    ShardFile,
    index_json,
    read_hf,
    read_safetensors,
    shard_layout,
)
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES, Archive

Tensors = dict[str, torch.Tensor]
DTYPES = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> torch.Tensor:
    """Random bits; the dtype need not have a random generator."""
    size = ITEMSIZE[dtype]
    for length in shape:
        size *= length
    high = 2 if dtype == "BOOL" else 256
    bits = torch.randint(high, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return bits.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def listed(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def written(shard: ShardFile, tensors: Tensors) -> bytes:
    """The whole file, every tensor put at the byte that the layout gives it."""
    content = bytearray(b"\xaa" * shard.size)
    content[: len(shard.header)] = shard.header
    for placed in shard.tensors:
        content[placed.at : placed.at + placed.bytes] = raw(tensors[placed.name])
    return bytes(content)


def library(folder: Path, tensors: Tensors) -> bytes:
    save_file(tensors, folder / "reference", metadata={"format": "pt"})
    return (folder / "reference").read_bytes()


def tensor_bytes(archive: Archive, name: str) -> bytes:
    (chunk,) = archive.tensors[name].chunks
    with open(chunk.file, "rb") as file:
        file.seek(chunk.start)
        return file.read(archive.tensors[name].bytes)


def model(names: int = 6) -> Tensors:
    dtypes = ["BF16", "F32", "F8_E4M3"]
    return {f"model.layers.{i}.w": random((i + 2, 5), dtypes[i % 3], i) for i in range(names)}


def save(folder: Path, tensors: Tensors, max_bytes: int = 60) -> list[ShardFile]:
    """A sharded folder as the library writes the shards, with our index."""
    folder.mkdir(exist_ok=True)
    layout = shard_layout(listed(tensors), max_bytes, None)
    for shard in layout:
        save_file({p.name: tensors[p.name] for p in shard.tensors}, folder / shard.name, metadata={"format": "pt"})
    (folder / INDEX).write_bytes(index_json(layout))
    return layout


# ---------------------------------------------------------------------------------------------------------- writing


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(sorted(ITEMSIZE)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_file_is_byte_for_byte_the_librarys(tmp_path_factory: pytest.TempPathFactory, spec: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("x")
    tensors = {name: random(tuple(shape), dtype, i) for i, (name, (dtype, shape)) in enumerate(spec.items())}
    (shard,) = shard_layout(listed(tensors), 1 << 40, None)
    assert shard.name == SINGLE and shard.size == len(written(shard, tensors))
    assert written(shard, tensors) == library(folder, tensors)


def test_all_dtypes_escapes_and_odd_sizes_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {f"{i % 3}.{dtype}": random((7, i), dtype, i) for i, dtype in enumerate(ITEMSIZE)}
    tensors |= {name: random((3,), "U8") for name in ('quo"te', "back\\slash", "tab\tnew\nline", "\x01\x7f", "äöü𝄞")}
    tensors |= {"scalar": random((), "F32"), "empty": random((0, 4), "BF16"), "none": random((0,), "I64")}
    (shard,) = shard_layout(listed(tensors), 1 << 40, None)
    assert written(shard, tensors) == library(tmp_path, tensors)
    (tmp_path / SINGLE).write_bytes(written(shard, tensors))
    loaded = load_file(tmp_path / SINGLE)
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: raw(t) for name, t in tensors.items()}
    with safe_open(tmp_path / SINGLE, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_files_are_cut_by_size_in_the_given_order() -> None:
    sizes = {"a": 40, "b": 60, "c": 1, "d": 300, "e": 50, "f": 50, "g": 1}
    layout = shard_layout([(name, "U8", (size,)) for name, size in sizes.items()], 100, None)
    assert [[p.name for p in shard.tensors] for shard in layout] == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert [shard.name for shard in layout] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    with pytest.raises(UserError, match="at least 1"):
        shard_layout([], 0, None)


def test_cuts_are_those_of_the_hub_library() -> None:
    tensors = {f"t{i:02d}": torch.empty(i * 37 % 90 + 1, dtype=torch.uint8) for i in range(60)}
    theirs = split_torch_state_dict_into_shards(
        tensors, max_shard_size=100, filename_pattern="model{suffix}.safetensors"
    )
    ours = shard_layout(listed(tensors), 100, None)
    # The hub's gives a tensor larger than the limit its own file outside the order; none is here.
    assert {p.name: shard.name for shard in ours for p in shard.tensors} == theirs.tensor_to_filename
    assert json.loads(index_json(ours))["metadata"] == theirs.metadata


@pytest.mark.parametrize("max_bytes", [1, 17, 61, 62, 130])
def test_a_weight_and_its_scales_stay_together(max_bytes: int) -> None:
    names = [f"w{i}.weight" for i in range(8)]
    tensors = [(name, "F8_E4M3", (5, 5)) for name in names] + [(f"{name}_scale_inv", "F32", (1, 1)) for name in names]
    tensors += [("alone_scale_inv", "F32", (1,))]  # whose weight is not here
    layout = shard_layout(tensors, max_bytes, None)
    place = {placed.name: shard.name for shard in layout for placed in shard.tensors}
    assert place.keys() == {name for name, _, _ in tensors}
    assert all(place[name] == place[f"{name}_scale_inv"] for name in names)
    assert len(layout) == {1: 9, 17: 9, 61: 5, 62: 4, 130: 2}[max_bytes]


def test_a_weight_map_of_exactly_these_tensors_gives_its_files() -> None:
    tensors = [("b", "F32", (2,)), ("a", "F32", (3,)), ("c", "BF16", (4,))]
    given_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    given_map["c"] = given_map["b"]
    layout = shard_layout(tensors, 1, given_map)
    assert {p.name: shard.name for shard in layout for p in shard.tensors} == given_map
    for other in ({"a": "x"}, given_map | {"d": "x"}, None):
        assert len(shard_layout(tensors, 1 << 30, other)) == 1


def test_a_read_folder_is_written_back_the_same(tmp_path: Path) -> None:
    tensors = model(9)
    save(tmp_path / "a", tensors)
    archive = read_hf(tmp_path / "a")
    names = {name: Path(t.chunks[0].file).name for name, t in archive.tensors.items()}
    layout = shard_layout(listed(dict(reversed(tensors.items()))), 7, names)
    for shard in layout:
        assert written(shard, tensors) == (tmp_path / "a" / shard.name).read_bytes()
    assert index_json(layout) == (tmp_path / "a" / INDEX).read_bytes()
    assert len(layout) == len(list((tmp_path / "a").glob("*.safetensors"))) > 2


def test_transformers_reads_a_layout_and_writes_the_same_index(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    source = LlamaForCausalLM(config)
    source.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    theirs = json.loads((tmp_path / "theirs" / INDEX).read_text())
    assert theirs["metadata"].pop("total_parameters") > 0
    layout = shard_layout(listed(dict(source.state_dict())), 1, theirs["weight_map"])
    assert index_json(layout).decode() == json.dumps(theirs, indent=2, sort_keys=True) + "\n"

    (tmp_path / "ours").mkdir()
    state = {name: tensor.detach().contiguous() for name, tensor in source.state_dict().items()}
    layout = shard_layout(listed(state), 4000, None)
    for shard in layout:
        (tmp_path / "ours" / shard.name).write_bytes(written(shard, state))
    (tmp_path / "ours" / INDEX).write_bytes(index_json(layout))
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "ours")
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert len(layout) > 3 and not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("sharded", [True, False])
def test_an_archive_points_at_every_tensors_bytes(tmp_path: Path, sharded: bool, monkeypatch: Any) -> None:
    tensors = model() | {"scalar": random((), "I64"), "empty": random((3, 0), "F32")}
    if sharded:
        save(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / SINGLE)  # without __metadata__
    monkeypatch.chdir(tmp_path)
    archive = read_hf(Path("."))
    assert (archive.kind, archive.objects) == ("hf", ()) and archive.folder == tmp_path
    assert sorted(listed(tensors)) == sorted((t.name, t.dtype, t.shape) for t in archive.tensors.values())
    for name, tensor in tensors.items():
        assert archive.tensors[name].chunks[0].sizes == tuple(tensor.shape)
        assert Path(archive.tensors[name].chunks[0].file).is_absolute()
        assert tensor_bytes(archive, name) == raw(tensor)
    assert archive.bytes == sum(len(raw(tensor)) for tensor in tensors.values())


def test_one_file_is_read_by_its_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"s": random((3, 2), "F32", 5)}, tmp_path / "scales.safetensors")
    (stored,) = read_safetensors(Path("scales.safetensors")).values()
    assert stored.chunks[0].file == str(tmp_path / "scales.safetensors")
    assert (stored.name, stored.dtype, stored.shape) == ("s", "F32", (3, 2))


def test_links_into_a_download_cache_are_followed(tmp_path: Path) -> None:
    tensors = model()
    save(tmp_path / "blobs", tensors)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    archive = read_hf(tmp_path / "snapshot")
    assert all(tensor_bytes(archive, name) == raw(tensor) for name, tensor in tensors.items())


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def edit_header(change: Callable[[dict[str, Any]], object], shard: int = 2) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[shard - 1]
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])

    return apply


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[1]
        file.write_bytes(change(file.read_bytes()))

    return apply


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def shift(header: dict[str, Any], by: int) -> None:
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"][0])
    last["data_offsets"] = [last["data_offsets"][0] + by, last["data_offsets"][1] + by]


def copy_shard(folder: Path) -> None:
    """Shard 1 again under another name, which the index gives to a tensor."""
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "again.safetensors")
    edit_index(lambda index: index["weight_map"].update({"model.layers.9.w": "again.safetensors"}))(folder)


def repeated(folder: Path) -> None:
    """A second entry of a tensor before the first: readers that take the last one see nothing."""
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    name = next(key for key in json.loads(content[8 : 8 + length]) if key != "__metadata__")
    again = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    new = again[:-1] + b"," + content[9 : 8 + length]
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def swap(index: dict[str, Any]) -> None:
    files = index["weight_map"]
    files["model.layers.0.w"], files["model.layers.5.w"] = files["model.layers.5.w"], files["model.layers.0.w"]


SHARD = r"model-00002-of-0000\d\.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), rf"lacks {SHARD}, of the \d files"),
    "truncated": (edit_bytes(lambda b: b[:-1]), rf"{SHARD} is cut: .* download"),
    "too long": (edit_bytes(lambda b: b + b"\0"), rf"{SHARD} has bytes that no tensor owns"),
    "cut in the header": (edit_bytes(lambda b: b[:60]), rf"{SHARD} is cut: its header needs"),
    "empty": (edit_bytes(lambda b: b""), rf"{SHARD} \(0 bytes\) is not a safetensors file"),
    "a few bytes": (edit_bytes(lambda b: b[:5]), rf"{SHARD} \(5 bytes\) is not a safetensors file"),
    "a web page": (edit_bytes(lambda b: b"<!DOCTYPE html><html>404</html>"), rf"{SHARD} .* is not a safetensors file"),
    "huge header": (edit_bytes(lambda b: b"\0\0\0\0\1\0\0\0{" + b[9:]), rf"{SHARD} .* is not a safetensors file"),
    "lfs pointer": (edit_bytes(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), r"git lfs pull"),
    "garbage header": (edit_bytes(lambda b: b[:9] + b"\xff" * 20 + b[29:]), rf"{SHARD} has a damaged header"),
    "no JSON": (edit_bytes(lambda b: b[:9] + b"}" * 20 + b[29:]), rf"{SHARD} has a damaged header"),
    "hole": (edit_header(lambda h: shift(h, 1)), rf"{SHARD} has a damaged header: a hole before tensor"),
    "overlap": (edit_header(lambda h: shift(h, -1)), rf"{SHARD} has a damaged header: an overlap before tensor"),
    "wrong shape": (edit_header(lambda h: first(h).update(shape=[1])), rf"{SHARD} .*needs \d+ bytes and got"),
    "negative": (edit_header(lambda h: first(h).update(shape=[-1, -10])), rf"{SHARD} has a damaged header: tensor"),
    "text shape": (edit_header(lambda h: first(h).update(shape=["a"])), rf"{SHARD} has a damaged header: tensor"),
    "no offsets": (edit_header(lambda h: first(h).pop("data_offsets")), rf"{SHARD} has a damaged header: tensor"),
    "list dtype": (edit_header(lambda h: first(h).update(dtype=["F32"])), rf"{SHARD} has a damaged header: tensor"),
    "unknown dtype": (edit_header(lambda h: first(h).update(dtype="F4")), rf"{SHARD}: .* dtype 'F4', .* F8_E4M3"),
    "twice in a header": (
        repeated,
        rf"{SHARD} has a damaged header \(model\.layers\.[0-9]\.w is there more than once\); download",
    ),
    "not in its shard": (edit_header(lambda h: h.update(new=h.pop("model.layers.2.w"))), r"model\.layers\.2\.w, exp"),
    "not in the index": (edit_index(lambda i: i["weight_map"].pop("model.layers.3.w")), r"not name: model\.layers\.3"),
    "shard not in the index": (
        edit_index(lambda i: [i["weight_map"].pop(f"model.layers.{n}.w") for n in (2, 3)]),
        rf"{INDEX} does not name {SHARD}, a part of the same model",
    ),
    "in two shards": (copy_shard, r"tensor model\.layers\.[01]\.w is in .*again\.safetensors and in model-00001"),
    "in another shard": (edit_index(swap), r"says that model\.layers\.0\.w is in .* has it; correct the index"),
    "index no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": {'), rf"{INDEX} is not an index"),
    "index no map": (lambda f: (f / INDEX).write_text("{}"), rf"{INDEX} is not an index"),
    "index a list": (edit_index(lambda i: i.update(weight_map=["a"])), rf"{INDEX} is not an index"),
    "index empty": (edit_index(lambda i: i.update(weight_map={})), rf"{INDEX} names no tensor"),
    "path outside": (edit_index(lambda i: i["weight_map"].update(a="../b.safetensors")), r"no plain file name"),
    "number as file": (edit_index(lambda i: i["weight_map"].update(a=3)), r"no plain file name"),
    "two models": (lambda f: save_file({"a": random((1,), "U8")}, f / SINGLE), rf"has {SINGLE} and .* stale"),
    "no index": (lambda f: (f / INDEX).unlink(), rf"model-00004-of-00004.safetensors but no {INDEX}"),
    "a folder as shard": (
        lambda f: (lambda s: (s.unlink(), s.mkdir()))(sorted(f.glob("*.saf*"))[1]),
        rf"{SHARD}: a fo",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_its_cure(tmp_path: Path, name: str) -> None:
    damage, message = BROKEN[name]
    save(tmp_path, model(6), max_bytes=80)
    assert len(read_hf(tmp_path).tensors) == 6
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path)


def test_pickles_are_not_read_and_the_message_says_why(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin are not read: they are Python pickles"):
        read_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="give the folder of a Hugging Face model"):
        read_hf(tmp_path)
    with pytest.raises(UserError, match="nowhere: it does not exist"):
        read_hf(tmp_path / "nowhere")


def test_a_wrong_total_size_and_unlisted_files_are_only_logged(tmp_path: Path, caplog: Any) -> None:
    tensors = model()
    save(tmp_path, tensors)
    with caplog.at_level(logging.WARNING):
        read_hf(tmp_path)
    assert caplog.messages == []
    edit_index(lambda index: index["metadata"].update(total_size=1))(tmp_path)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with caplog.at_level(logging.WARNING):
        assert len(read_hf(tmp_path).tensors) == 6
    assert "consolidated.safetensors not read" in caplog.messages[0]
    assert "total_size is 1, the tensors have" in caplog.messages[1]


@given(st.integers(0, 150), st.binary(min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_damage_gives_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, put: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    content = bytearray(written(shard_layout(listed(model(2)), 1 << 30, None)[0], model(2)))
    content[at : at + len(put)] = put
    file.write_bytes(content)
    try:
        read_safetensors(file)
    except UserError:
        return
    load_file(file)  # what we take, the library takes


def test_a_model_of_92_thousand_tensors_is_read_in_seconds(tmp_path: Path) -> None:
    per_shard = 565
    names = [f"model.layers.{i % 61}.mlp.experts.{i}.gate_proj.weight" for i in range(per_shard * 163)]
    place = {name: f"model-{i // per_shard + 1:05d}-of-00163.safetensors" for i, name in enumerate(names)}
    layout = shard_layout([(name, "F8_E4M3", (2048, 7168)) for name in names], 1 << 40, place)
    for shard in layout:
        with open(tmp_path / shard.name, "wb") as file:
            file.write(shard.header)
            os.truncate(file.fileno(), shard.size)  # a sparse file of the true size
    (tmp_path / INDEX).write_bytes(index_json(layout))
    start = time.process_time()
    archive = read_hf(tmp_path)
    spent = time.process_time() - start
    assert len(archive.tensors) == len(names) and archive.bytes == len(names) * 2048 * 7168
    assert spent < 20, f"{spent:.1f} s"  # 1 to 3 s on a laptop
