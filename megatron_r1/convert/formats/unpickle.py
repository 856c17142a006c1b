"""Pickles of checkpoints read without running anything in them: `.metadata`, `common.pt`, `model_optim_rng.pt`.

The readers of Megatron checkpoints (`torch_dist.py`, `legacy.py`) stand on this. A pickle is a program that may call
any function it can name. Here it gets what checkpoints of Megatron and torch hold: tensors become `Lazy` records of
where their bytes lie, the classes of torch's distributed checkpoints become records of their fields, all other known
classes become `Inert` objects that keep what they were given, and a global outside these tables ends the reading.
What is handed to a pickle is a class that cannot be changed or an immutable value, so it leaves no trace either.

torch.save writes a zip, every entry stored and not compressed: `data.pkl` with the objects, `data/N` with the bytes
of storage N. A tensor is a reduce of `_rebuild_tensor_v2(storage, offset, sizes, strides, ...)` (`_v3` for FP8, whose
storages are untyped), and a storage a persistent id `("storage", class, "N", device, elements)`. Several tensors may
lie in one storage: the parameters of a distributed optimizer are views of its buffers.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.torch_zip import STORAGES, damaged, data_start, entries, pickled
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES


class Lazy(NamedTuple):
    """A tensor whose bytes stay on disk."""

    dtype: str  # a key of storage.ITEMSIZE
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # byte of its first element in the file

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


class _Storage(NamedTuple):
    dtype: str
    start: int
    elements: int


class _Frozen(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{cls.__name__} belongs to the reader")  # BUILD can set attributes of any object it is given


class Inert(metaclass=_Frozen):
    """An object of a class that is known by name only: what it was made from, nothing run.

    origin: "module.name" of the class. args: of its constructor (an enum's value, for one). state: what it was
    restored with, for an argparse.Namespace the dict of its attributes. items: of a list or (key, value) of a dict.
    """

    origin = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any) -> Inert:
        """What a call of this object would have returned."""
        return type(self)(*args)

    def append(self, item: Any) -> None:
        """Of a class that is a list."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class Record(metaclass=_Frozen):
    """Base of the records of torch.distributed.checkpoint; a pickle fills in the fields, unchecked."""


class TensorProperties(Record):
    """Of a tensor in `.metadata`; of its fields only the dtype means anything today."""

    dtype: str

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class ChunkStorageMetadata(Record):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorStorageMetadata(Record):
    """A tensor and the boxes that cover it."""

    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


class BytesStorageMetadata(Record):
    """Anything else."""


class MetadataIndex(Record):
    """Names a stored piece: a box of a tensor by its offset, or an object (offset None)."""

    fqn: str
    offset: tuple[int, ...] | None = None


class StorageInfo(Record):
    """Where a piece lies: a torch.save zip of `length` bytes inside a file."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


class Metadata(Record):
    """The root of `.metadata`."""

    state_dict_metadata: dict[str, Record]
    storage_data: dict[MetadataIndex, StorageInfo]


class _Mapping(dict, metaclass=_Frozen):  # type: ignore[type-arg]
    """An OrderedDict; a module's state has `_metadata` as an attribute, which nobody needs."""

    def __setstate__(self, state: Any) -> None:
        pass


class _DefaultMapping(_Mapping):
    def __init__(self, *_: Any) -> None:
        super().__init__()


class _Attribute(metaclass=_Frozen):
    """getattr as pickles use it: for members of enums (Python 3.11) and class methods. Looks nothing up."""

    def __new__(cls, owner: Any, name: str) -> Any:
        if not (isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str)):
            raise ValueError("getattr of something other than a class that it names")
        return owner(name)


class _Encoded(metaclass=_Frozen):
    """`_codecs.encode`, how protocol 2 spells bytes."""

    def __new__(cls, text: str, encoding: str) -> Any:
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {encoding!r}")
        return text.encode("latin1")


class _Bytes(metaclass=_Frozen):
    """`bytes` of what the pickle itself holds: text in latin1, as protocol 2 spells a bytearray, or bytes. bytes(n)
    would take as much memory as a few digits can ask for.
    """

    made = bytes

    def __new__(cls, content: Any = b"", encoding: str = "latin-1") -> Any:
        if encoding not in ("latin-1", "latin1") or not isinstance(content, bytes | bytearray | str):
            raise ValueError(f"{cls.made.__name__} of {type(content).__name__}")
        return cls.made(content.encode("latin1") if isinstance(content, str) else content)


class _ByteArray(_Bytes):
    """The same, of `bytearray`."""

    made = bytearray  # type: ignore[assignment]


class _Tensor(metaclass=_Frozen):
    """`_rebuild_tensor` and `_v2`: (storage, offset, sizes, strides, ...)."""

    def __new__(cls, storage: _Storage, offset: int, sizes: Any, strides: Any, *_: Any) -> Any:
        return _view(storage, offset, tuple(sizes), tuple(strides))


class _TensorV3(metaclass=_Frozen):
    """`_rebuild_tensor_v3`: of an untyped storage, the dtype beside it."""

    def __new__(
        cls, storage: _Storage, offset: int, sizes: Any, strides: Any, _g: Any, _h: Any, dtype: str, *_: Any
    ) -> Any:
        typed = _Storage(dtype, storage.start, storage.elements * ITEMSIZE[storage.dtype] // ITEMSIZE[dtype])
        return _view(typed, offset, tuple(sizes), tuple(strides))


class _First(metaclass=_Frozen):
    """`_rebuild_parameter` and its kin: the tensor, without what hangs on it."""

    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


class _Subclass(metaclass=_Frozen):
    """`_rebuild_from_type_v2(function, type, args, state)`: a tensor with attributes."""

    def __new__(cls, function: Any, _type: Any, args: tuple[Any, ...], *_: Any) -> Any:
        if function not in (_Tensor, _TensorV3, _First):
            raise ValueError("a tensor rebuilt by something else than torch's functions")
        return function(*args)


def _view(storage: _Storage, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Lazy:
    numbers = (offset, *sizes, *strides)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor of impossible sizes")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= storage.elements:
        raise ValueError(f"a tensor that ends behind its storage of {storage.elements} elements")
    return Lazy(storage.dtype, sizes, strides, storage.start + offset * ITEMSIZE[storage.dtype])


_DCP = "torch.distributed.checkpoint."
_GLOBALS: dict[tuple[str, str], Any] = {
    **{("torch", torch): name for name, torch in TORCH_NAMES.items()},
    **{(module, storage): name for name, storage in STORAGES.items() for module in ("torch", "torch.cuda")},
    ("torch", "UntypedStorage"): "U8",
    ("torch.storage", "UntypedStorage"): "U8",
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _TensorV3,
    ("torch._utils", "_rebuild_parameter"): _First,
    ("torch._utils", "_rebuild_parameter_with_state"): _First,
    ("torch._tensor", "_rebuild_from_type_v2"): _Subclass,
    (f"{_DCP}metadata", "Metadata"): Metadata,
    (f"{_DCP}metadata", "MetadataIndex"): MetadataIndex,
    (f"{_DCP}metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{_DCP}metadata", "BytesStorageMetadata"): BytesStorageMetadata,
    (f"{_DCP}metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{_DCP}metadata", "TensorProperties"): TensorProperties,
    (f"{_DCP}filesystem", "_StorageInfo"): StorageInfo,
    ("collections", "OrderedDict"): _Mapping,
    ("collections", "Counter"): _Mapping,
    ("collections", "defaultdict"): _DefaultMapping,
    ("_codecs", "encode"): _Encoded,
    **{
        (module, name): kind
        for name, kind in {
            **{kind.__name__: kind for kind in (set, frozenset, complex, slice)},
            **{"bytes": _Bytes, "bytearray": _ByteArray},
        }.items()
        for module in ("builtins", "__builtin__")
    },
    ("builtins", "getattr"): _Attribute,
    ("__builtin__", "getattr"): _Attribute,
}
# Libraries whose settings end up in checkpoints. Nothing of them is ever imported or called.
_INERT_PACKAGES = {
    *("megatron", "transformer_engine", "transformer_engine_torch", "apex", "modelopt", "numpy"),
    *("nemo", "nemo_rl", "slime", "verl", "omegaconf"),
}
_INERT = {
    *(("argparse", "Namespace"), ("types", "SimpleNamespace"), ("signal", "Signals"), ("collections", "deque")),
    *(("_io", "BytesIO"), ("io", "BytesIO"), ("datetime", "datetime"), ("datetime", "timedelta")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("torch", "device"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter")),
    *(("torch.serialization", "_get_layout"), ("torch.torch_version", "TorchVersion")),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, storage: Callable[[str], tuple[int, int]] | None) -> None:
        super().__init__(io.BytesIO(data))
        self.where, self.storage = where, storage
        self.known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _GLOBALS:
            return _GLOBALS[key]
        if key not in self.known:
            if not (key in _INERT or module.startswith(_DCP) or module.split(".")[0] in _INERT_PACKAGES):
                raise UserError(
                    f"{self.where} asks for {module}.{name} while it is read, which is neither Megatron's nor among "
                    "the classes that its checkpoints hold; nothing was run. If you trust the file, load it with "
                    "torch.load and save it again without that object"
                )
            self.known[key] = _Frozen(name, (Inert,), {"origin": f"{module}.{name}"})
        return self.known[key]

    def persistent_load(self, key: Any) -> _Storage:
        kind, dtype, name, _device, elements = key
        if kind != "storage" or self.storage is None or dtype not in ITEMSIZE or type(elements) is not int:
            raise ValueError("an object that lies outside the pickle and is no storage of a tensor")
        start, size = self.storage(name)
        if elements * ITEMSIZE[dtype] > size:
            raise ValueError(f"storage {name} has {size} bytes, which is less than its {elements} elements")
        return _Storage(dtype, start, elements)


def unpickle(data: bytes, where: str, storage: Callable[[str], tuple[int, int]] | None = None) -> Any:
    """The objects of a pickle; see the module's docstring for what becomes of them.

    where: names the pickle in messages. storage: name of a storage -> (first byte, bytes), for torch's pickles.
    Raises UserError for a global that no checkpoint needs, and for anything that is no whole pickle.
    """
    try:
        return _Unpickler(data, where, storage).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise damaged(where, error) from error


def read_pickle(path: Path) -> Any:
    """The objects of a plain pickle file. Raises UserError; see `unpickle`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return unpickle(data, str(path))


def read_torch(path: Path) -> Any:
    """The objects of a file of torch.save, its tensors as `Lazy`; no byte of a tensor is read.

    Raises UserError; see `unpickle`.
    """
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        handle, length, where = file.fileno(), os.fstat(file.fileno()).st_size, str(path)

        def read(start: int, size: int) -> bytes:
            return os.pread(handle, size, start)

        found = entries(read, length, where)
        ranges: dict[str, tuple[int, int]] = {}

        def storage(name: str) -> tuple[int, int]:
            if name not in ranges:
                entry = found[f"data/{name}"]
                start = data_start(read, entry, where)
                if start + entry.size > length:
                    raise ValueError(f"storage {name} is cut off")
                ranges[name] = (start, entry.size)
            return ranges[name]

        return unpickle(pickled(read, found, where), where, storage)
