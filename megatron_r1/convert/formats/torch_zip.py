"""The zips that torch.save writes, read and written byte by byte, without torch.

`unpickle.py` reads the files of a checkpoint through this, `torch_dist.py` the chunks inside `.distcp` files, and the
executor streams new chunks as head, bytes of the tensor, tail.

All entries are stored, not compressed, below one folder (`archive/` for what is written to a stream): `data.pkl`,
`byteorder`, `version`, and `data/N` with the bytes of storage N. torch.save pads the local header's extra field so
that the data begin at a multiple of 64 bytes, writes sizes and CRC behind the data (in "data descriptors"), and adds
`.format_version`, `.storage_alignment`, `.data/serialization_id`. torch.load needs none of these and ignores the CRC
(as it must: `torch.serialization.set_crc32_options(False)` writes none), so a frame is known before its data are.
Python's zipfile does check the CRC and would refuse the entry `data/0`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple
from zlib import crc32

from megatron_r1.config.errors import UserError
from megatron_r1.convert.storage import ITEMSIZE, TORCH_NAMES

Read = Callable[[int, int], bytes]
"""(first byte, number of bytes) -> those bytes, fewer at the end of the file."""

STORAGES = {
    **{"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"},
    **{"I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage"},
    "BOOL": "BoolStorage",
}
"""torch's storage class of each dtype that has one; the FP8 ones do not."""


def damaged(where: str, reason: object) -> UserError:
    """The message for a file that is not what it should be."""
    return UserError(f"{where} is damaged or no checkpoint file: {reason}. Copy it again from where it came from")


class Entry(NamedTuple):
    """An entry of a zip."""

    header: int  # byte of its local header
    size: int


TAIL = 1280  # bytes that hold the directory of a zip with one storage as torch.save writes it
_DIRECTORY = struct.Struct("<4s6H3I5H2I")


def entries(read: Read, length: int, where: str) -> dict[str, Entry]:
    """The directory of a torch.save zip, names without the folder that torch puts around them.

    Reads its last bytes, and more only if the directory is longer. Raises UserError for what is no such zip.
    """
    try:
        tail = read(max(0, length - TAIL), min(length, TAIL))
        end = tail.rfind(b"PK\5\6")
        if end < 0:
            raise ValueError("it does not end like a file of torch.save")
        size, start, _comment = struct.unpack_from("<IIH", tail, end + 12)
        if end >= 20 and tail[end - 20 : end - 16] == b"PK\6\7":  # zip64
            (record,) = struct.unpack_from("<Q", tail, end - 12)
            size, start = struct.unpack_from("<QQ", read(record, 56), 40)
        if start + size > length:
            raise ValueError("its directory lies behind its end")
        return dict(_directory(read(start, size)))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise damaged(where, error) from error


def _directory(data: bytes) -> list[tuple[str, Entry]]:
    found, at = [], 0
    while at < len(data):
        fields = _DIRECTORY.unpack_from(data, at)
        signature, flags, method, packed, size = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        name = data[at + 46 : at + 46 + name_length].decode()
        extra = at + 46 + name_length
        if signature != b"PK\1\2":
            raise ValueError("its directory is garbled")
        if method or flags & 1:
            raise ValueError(f"its entry {name} is compressed or encrypted, which torch.save never does")
        if 0xFFFFFFFF in (packed, size, header):
            size, header = _zip64(data[extra : extra + extra_length], packed, size, header)
        found.append((name.partition("/")[2], Entry(header, size)))
        at = extra + extra_length + comment_length
    return found


def _zip64(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int]:
    """(size, header) from the extra field with the long forms of those that read 0xFFFFFFFF."""
    at = 0
    while struct.unpack_from("<H", extra, at)[0] != 1:
        at += 4 + struct.unpack_from("<H", extra, at + 2)[0]
    at += 4
    values = []
    for value in (size, packed, header):
        if value == 0xFFFFFFFF:
            (value,) = struct.unpack_from("<Q", extra, at)
            at += 8
        values.append(value)
    return values[0], values[2]


def data_start(read: Read, entry: Entry, where: str) -> int:
    """First byte of an entry's data."""
    header = read(entry.header, 30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise damaged(where, f"no entry of a zip begins at its byte {entry.header}")
    name, extra = struct.unpack_from("<HH", header, 26)
    return entry.header + 30 + int(name) + int(extra)


def content(read: Read, found: dict[str, Entry], name: str, where: str) -> bytes:
    """The bytes of a small entry."""
    if name not in found:
        raise damaged(where, f"it has no entry {name}")
    data = read(data_start(read, found[name], where), found[name].size)
    if len(data) != found[name].size:
        raise damaged(where, f"its entry {name} is cut off")
    return data


def pickled(read: Read, found: dict[str, Entry], where: str) -> bytes:
    """The `data.pkl` of a torch.save zip. Raises UserError if its tensors are not little-endian."""
    if "byteorder" in found and content(read, found, "byteorder", where) != b"little":
        raise UserError(f"{where} was written on a big-endian machine: load it there and convert it with torch.save")
    return content(read, found, "data.pkl", where)


_LONG = 0xFFFFFFFF
_ALIGNMENT = 64
_SMALL = ((b"archive/byteorder", b"little"), (b"archive/version", b"3\n"))


def frame(dtype: str, sizes: Sequence[int]) -> tuple[bytes, bytes]:
    """What lies before and behind the bytes of a contiguous CPU tensor in a file of torch.save.

    dtype: a key of `storage.ITEMSIZE`. head + row-major little-endian elements + tail is what torch.load reads (with
    weights_only too, and from any place in a file); the elements begin at a multiple of 64 bytes. Same input, same
    bytes.
    """
    size = prod(sizes) * ITEMSIZE[dtype]
    before = [(b"archive/data.pkl", _tensor_pickle(dtype, sizes)), *_SMALL]
    head, directory = _stored(before)
    name, header = b"archive/data/0", len(head)
    long = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LONG else b""
    shown = min(size, _LONG)
    padding = -(header + 30 + len(name) + len(long) + 4) % _ALIGNMENT
    extra = long + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    head += _local(name, shown, 0, len(extra)) + extra
    directory += _central(name, shown, 0, header, len(long)) + long
    return head, directory + _end(len(before) + 1, len(directory), len(head) + size)


_EMPTY_EXTRA_STATE = [None]


def object_blob(value: object = _EMPTY_EXTRA_STATE) -> bytes:
    """A file of torch.save for a plain Python value without tensors: same value, same bytes.

    A ShardedObject of Megatron is stored as the list of the values of its shards: an empty `_extra_state` is the blob
    of `[None]`, and the blob of None alone fails to load.
    """
    body, directory = _stored([(b"archive/data.pkl", pickle.dumps(value, protocol=2)), *_SMALL])
    return body + directory + _end(1 + len(_SMALL), len(directory), len(body))


def _stored(files: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """(the entries, their part of the directory)."""
    body, directory = b"", b""
    for name, data in files:
        directory += _central(name, len(data), crc32(data), len(body), 0)
        body += _local(name, len(data), crc32(data), 0) + data
    return body, directory


def _local(name: bytes, size: int, crc: int, extra: int) -> bytes:
    return struct.pack("<4s5H3I2H", b"PK\3\4", _needs(size), 0, 0, 0, 0x21, crc, size, size, len(name), extra) + name


def _central(name: bytes, size: int, crc: int, header: int, extra: int) -> bytes:
    needs = _needs(size)
    fixed = (b"PK\1\2", needs, needs, 0, 0, 0, 0x21, crc, size, size, len(name), extra, 0, 0, 0, 0, header)
    return _DIRECTORY.pack(*fixed) + name


def _needs(size: int) -> int:
    return 45 if size == _LONG else 20  # the version of the format that knows zip64


def _end(count: int, size: int, start: int) -> bytes:
    """The end of a zip whose directory of `size` bytes begins at byte `start`."""
    long = b""
    if start >= _LONG:
        long = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        long += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    return long + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(start, _LONG), 0)


def _tensor_pickle(dtype: str, sizes: Sequence[int]) -> bytes:
    """The pickle of protocol 2 that torch.save makes of a tensor, without its unused memo."""
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    typed = dtype in STORAGES
    kind = f"torch\n{STORAGES[dtype]}" if typed else "torch.storage\nUntypedStorage"
    elements = prod(sizes) * (1 if typed else ITEMSIZE[dtype])
    storage = b"(" + _text("storage") + f"c{kind}\n".encode() + _text("0") + _text("cpu") + _integer(elements) + b"tQ"
    version, last = ("v2", "") if typed else ("v3", f"ctorch\n{TORCH_NAMES[dtype]}\n")
    arguments = storage + _integer(0) + _tuple(sizes) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return f"\x80\x02ctorch._utils\n_rebuild_tensor_{version}\n(".encode("latin1") + arguments + last.encode() + b"tR."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
