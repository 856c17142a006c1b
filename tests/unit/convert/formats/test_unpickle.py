"""Pickles of checkpoints: everything that Megatron and torch store comes out, and nothing in them runs."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats import unpickle as module
from megatron_r1.convert.formats.unpickle import Inert, Lazy, read_pickle, read_torch, unpickle
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `marker`, and the global that the message must name ("": another message)."""
    order = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    deep = {"model": {"decoder": [{"weight": (1, Calls(os.system, order))}]}}
    getattr_system = b"\x80\x02c__builtin__\ngetattr\n(cos\n__name__\n" + text("system") + b"tR."
    member = b"\x80\x02c__builtin__\ngetattr\n(ctorch\nSize\n" + text("__subclasses__") + b"tR)R."
    dotted = b"\x80\x04" + text("megatron.core") + text("x") + b"\x93" + text(order) + b"\x85R."
    by_subclass = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nset\nN(" + text(order) + b"tNtR."
    return {
        "os.system": (pickle.dumps(Calls(os.system, order)), f"{os.name}.system"),
        "os.system of protocol 0": (pickle.dumps(Calls(os.system, order), protocol=0), f"{os.name}.system"),
        "eval": (pickle.dumps(Calls(eval, code)), "builtins.eval"),
        "exec": (pickle.dumps(Calls(exec, code), protocol=2), "__builtin__.exec"),
        "subprocess": (pickle.dumps(Calls(subprocess.run, ["touch", str(marker)])), "subprocess.run"),
        "nested": (pickle.dumps(deep), f"{os.name}.system"),
        "attrgetter": (b"\x80\x02coperator\nattrgetter\n" + text("system") + b"\x85R.", "operator.attrgetter"),
        "getattr of a module": (getattr_system, "os.__name__"),
        "getattr of a class": (member, ""),
        "import": (b"\x80\x02c__builtin__\n__import__\n" + text("os") + b"\x85R.", "__builtin__.__import__"),
        "torch.load": (b"\x80\x02ctorch\nload\n" + text(str(marker)) + b"\x85R.", "torch.load"),
        "storage from bytes": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\n" + text(order) + b"\x85R.",
            "torch.storage._load_from_bytes",
        ),
        "torch's own eval": (b"\x80\x02ctorch._utils\n__builtins__\n" + text(order) + b"\x85R.", "torch._utils"),
        "a path in a name": (b"\x80\x04" + text("os") + text("path.os.system") + b"\x93.", "os.path.os.system"),
        "the old instance opcode": (b"(" + b"S'" + order.encode() + b"'\nios\nsystem\n.", "os.system"),
        "a rebuild that is no rebuild": (by_subclass, ""),
        "persistent id, a global": (b"\x80\x02(cos\nsystem\n" + text(order) + b"tQ.", "os.system"),
        "persistent id, a storage": (b"\x80\x02(" + text("storage") + text("F32") * 3 + b"K\x01tQ.", ""),
        "an extension": (b"\x80\x02\x82\x01.", ""),
        "harmless name": (dotted, "inert"),
    }


NAMES = sorted(hostile(Path()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zipped", [False, True])
def test_hostile_pickles_run_nothing(tmp_path: Path, name: str, zipped: bool) -> None:
    marker = tmp_path / "marker"
    data, refused = hostile(marker)[name]
    path = tmp_path / "common.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("common/data.pkl", data)
    else:
        path.write_bytes(data)
    read = read_torch if zipped else read_pickle
    if refused == "inert":
        assert isinstance(read(path), Inert)
    else:
        with pytest.raises(UserError, match=r"common\.pt") as error:
            read(path)
        assert refused in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["bytes", "bytearray"])
@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_a_few_digits_do_not_become_gigabytes(module: str, name: str) -> None:
    order = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"%s\x85R."
    tracemalloc.start()
    for asked in (b"\x8a\x05\x00\x00\x00\x00\x02", b"J\xff\xff\xff\x7f", b"]", b"N"):  # 2^33, 2^31 - 1
        with pytest.raises(UserError, match=f"{name} of "):
            unpickle(order % asked, "bomb")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [b"", b"\x00\xff\x80", bytearray(), bytearray(b"\x00\xff\x80")], ids=repr)
def test_bytes_of_every_protocol(value: bytes | bytearray, protocol: int) -> None:
    found = unpickle(pickle.dumps(value, protocol), "bytes")
    assert found == value and type(found) is type(value)


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """What the test above relies on: read by pickle itself, they do make the file."""
    for name in ("os.system", "eval", "nested", "subprocess", "the old instance opcode"):
        marker = tmp_path / name.replace(" ", "")
        pickle.loads(hostile(marker)[name][0])
        assert marker.exists(), name


def test_a_class_of_megatron_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __init__(self, path: str) -> None:
            Path(path).touch()

        def __setstate__(self, path: str) -> None:
            Path(path).touch()

    Evil.__module__, Evil.__qualname__ = "megatron.core.evil", "Evil"
    fake = types.ModuleType("megatron.core.evil")
    fake.Evil = Evil  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.core.evil", fake)
    marker = str(tmp_path / "marker")
    made = unpickle(pickle.dumps(Calls(Evil, marker)), "x")
    assert (made.origin, made.args) == ("megatron.core.evil.Evil", (marker,))
    bare = (
        pickle.dumps({"a": object.__new__(Evil)}) and b"\x80\x02cmegatron.core.evil\nEvil\n)\x81" + text(marker) + b"b."
    )
    assert unpickle(bare, "x").state == marker
    assert not os.path.exists(marker)
    pickle.loads(bare)
    assert os.path.exists(marker)


@pytest.mark.parametrize("owner", [b"cmegatron.x\nY\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n"])
def test_a_pickle_cannot_change_the_reader(owner: bytes) -> None:
    change = b"\x80\x02" + owner + b"(N}" + text("__setstate__") + b"K\x01stb."
    with pytest.raises(UserError, match="damaged"):
        unpickle(change, "x")


class Kind(enum.Enum):
    FLASH = 3


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_a_common_file_as_megatron_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kind.__module__, Kind.__qualname__ = "megatron.core.transformer.enums", "AttnBackend"
    fake = types.ModuleType(Kind.__module__)
    fake.AttnBackend = Kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, Kind.__module__, fake)
    args = argparse.Namespace(
        num_layers=4, params_dtype=torch.bfloat16, attention_backend=Kind.FLASH, load=Path("/x"), lr=np.float64(0.5)
    )
    state = {
        "args": args,
        "iteration": 7,
        "betas": (0.9, 0.95),
        "set": {1, 2},
        "raw": b"\0\xff\x80",
        "device": torch.device("cuda", 1),
        "random": np.arange(3),
        "ordered": OrderedDict(a=1.5, b=None),
    }
    path = tmp_path / "common.pt"
    path.write_bytes(saved(state))
    read = read_torch(path)
    assert {k: read[k] for k in ("iteration", "betas", "set", "raw", "ordered")} == {
        k: state[k] for k in ("iteration", "betas", "set", "raw", "ordered")
    }
    assert read["args"].origin == "argparse.Namespace"
    assert read["args"].state["num_layers"] == 4
    assert read["args"].state["params_dtype"] == "BF16"
    backend = read["args"].state["attention_backend"]
    assert (backend.origin, backend.args) == ("megatron.core.transformer.enums.AttnBackend", (3,))
    assert read["device"].args == ("cuda", 1)
    assert read["random"].origin.startswith("numpy.")


def test_an_enum_pickled_by_name() -> None:
    data = b"\x80\x02c__builtin__\ngetattr\n(cmegatron.core.enums\nModelType\n" + text("retro") + b"tR."
    made = unpickle(data, "x")
    assert (made.origin, made.args) == ("megatron.core.enums.ModelType", ("retro",))


def content(path: Path, tensor: Lazy) -> bytes:
    with path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.bytes)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_tensors_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    flat = torch.randn(60)
    tensors = {
        "parameter": torch.nn.Parameter(torch.randn(4, 5)),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "view of a buffer": flat[7:31].view(4, 6),
        "another": flat[31:60],
        "transposed": torch.randn(3, 8).t(),
        "column": torch.randn(6, 4)[:, :1],
        "rows": torch.randn(6, 4)[2:4],
    }
    for name in ITEMSIZE:
        dtype = getattr(torch, TORCH_NAMES[name])
        tensors[name] = torch.randint(0, 2, (5, 3)).to(torch.float32).add(1 if "E8M0" in name else 0).to(dtype)
    path = tmp_path / "state.pt"
    torch.save({"model": tensors}, path)
    read = read_torch(path)["model"]
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        lazy = read[name]
        assert isinstance(lazy, Lazy)
        assert (TORCH_NAMES[lazy.dtype], lazy.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert lazy.contiguous == tensor.is_contiguous(), name
        if lazy.contiguous and tensor.numel():
            assert content(path, lazy) == raw(tensor.detach()), name
    assert {name for name, lazy in read.items() if not lazy.contiguous} == {"transposed", "column"}
    assert read["another"].start - read["view of a buffer"].start == 24 * 4


def test_no_byte_of_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    torch.save({"a": torch.zeros(1 << 20), "b": torch.ones(1 << 20)}, path)
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(module.os, "pread", lambda handle, size, at: sizes.append(size) or pread(handle, size, at))
    assert read_torch(path)["b"].shape == (1 << 20,)
    assert sum(sizes) < 4096


def test_anything_but_the_whole_file_is_an_error(tmp_path: Path) -> None:
    whole = saved({"a": torch.arange(40), "b": {"c": 1}})
    plain = pickle.dumps({"a": [1, 2.5, "x"], "b": torch.Size([3])})
    path = tmp_path / "cut"
    for data, read in ((whole, read_torch), (plain, read_pickle)):
        path.write_bytes(data)
        read(path)
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            with pytest.raises(UserError, match="cut is damaged"):
                read(path)
    for garbage in (b"", b"\0" * 3000, b"PK\5\6" + b"\xff" * 18, os.urandom(2000), b"<html>"):
        path.write_bytes(garbage)
        for read in (read_torch, read_pickle):
            with pytest.raises(UserError, match="cut is damaged"):
                read(path)
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        read_torch(tmp_path / "absent")


def test_a_tensor_must_lie_inside_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    whole = saved(torch.zeros(8, 4))
    assert whole.count(b"K\x08K\x04\x86") == 1
    path.write_bytes(whole.replace(b"K\x08K\x04\x86", b"K\x09K\x04\x86"))
    with pytest.raises(UserError, match="ends behind its storage of 32 elements"):
        read_torch(path)


def test_a_storage_must_lie_inside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    whole = saved(torch.zeros(77))
    sizes = (77 * 4).to_bytes(4, "little") * 2
    path.write_bytes(whole.replace(sizes, (77 * 4000).to_bytes(4, "little") * 2))
    with pytest.raises(UserError, match="storage 0 is cut off"):
        read_torch(path)


def test_other_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1] * 100, protocol=2))
    with pytest.raises(UserError, match="compressed"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data.pkl", pickle.dumps(1, protocol=2))
    with pytest.raises(UserError, match="big-endian"):
        read_torch(path)
    path.write_bytes(saved({"a": 1}, _use_new_zipfile_serialization=False))
    with pytest.raises(UserError, match=r"does not end like a file of torch\.save"):
        read_torch(path)


def test_reading_imports_no_torch() -> None:
    reader = "megatron_r1.convert.formats.legacy"
    code = f"import sys, {reader}; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
