"""What makes a converted folder trustworthy: atomic files, checksums in manifest.json, a journal to resume. No torch.

A conversion opens the `Journal` of its target folder, writes every file through `replacing` (so that a file under its
final name is whole and on disk), enters each with its checksum, writes the manifest, and removes the journal.
`check_manifest` reads such a folder again, on any machine. manifest.json keeps the key `files` {name: bytes} that
`megatron_r1.checkpoint.folders.check` reads.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_r1 import __version__
from megatron_r1.config.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
JOURNAL = ".conversion-journal.jsonl"
PART = ".part"
"""Suffix of a file that is being written."""
MODE, FOLDER_MODE = 0o644, 0o755  # other users read the export, whatever the umask
TOOL = "megatron_r1.convert"
BUFFER_BYTES = 8 << 20
# Files that a loader picks up by their name: one that no conversion wrote changes what is loaded.
_LOADED = (".safetensors", ".distcp", ".safetensors.index.json")
_CURES = {
    errno.ENOSPC: "no space is left there. Free some and go on with --resume, or choose another folder",
    errno.EDQUOT: "your disk quota is used up. Free some and go on with --resume, or choose another folder",
    errno.EROFS: "that file system is read-only. Choose another folder",
    errno.EACCES: "you may not read or write it. Change its permissions, or choose another folder",
    errno.EPERM: "you may not read or write it. Change its permissions, or choose another folder",
    errno.ENOENT: "it does not exist. Check the spelling, and that the disk is mounted",
    errno.ENOTDIR: "a part of this path is a file, not a folder. Choose another folder",
    errno.EEXIST: "a file is where a folder should be. Choose another folder",
    errno.EISDIR: "a folder is where a file should be. Remove it, or choose another folder",
    errno.EMFILE: "too many files are open. Raise the limit (ulimit -n), or use fewer workers",
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many blocks of quantised tensors kept the scale that they came with, and how many got another."""

    kept: int = 0
    new: int = 0

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(self.kept + other.kept, self.new + other.new)

    def __bool__(self) -> bool:
        return self.kept + self.new > 0

    def __str__(self) -> str:
        total = self.kept + self.new
        return f"{self.kept:,} of {total:,} FP8 blocks keep the bytes they came with, {self.new:,} were quantised anew"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file. blocks: of the tensors in it."""

    bytes: int
    xxh3_128: str  # 32 hex digits
    blocks: Blocks = Blocks()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into one message with its cure; `path` is named when the error names no file.

    Raises UserError for what the user can cure (space, permissions, a wrong path), RunFailed for the rest, such as a
    broken disk.
    """
    try:
        yield
    except OSError as error:
        where, said = error.filename or path, error.strerror or str(error)
        if (cure := _CURES.get(error.errno or 0)) is not None:
            raise UserError(f"{where}: {cure} ({said})") from error
        raise RunFailed(f"{where}: {said}") from error


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A file descriptor open for reading and writing that becomes `path`, mode 0644, on disk, when the body ends well.

    The bytes go to `path` + ".part" in the same folder, which is removed if the body fails. Raises as `disk_errors`
    (wrap reads of other files in the body in their own `disk_errors`, or their failures are laid on `path`).
    """
    part = path.with_name(path.name + PART)
    with disk_errors(path):
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, MODE)
        try:
            try:
                yield handle
                os.fchmod(handle, MODE)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def atomic_write(path: Path, data: bytes) -> FileRecord:
    """Put `data` at `path`, whole or not at all, mode 0644, on disk on return. Raises as `disk_errors`."""
    with replacing(path) as handle:
        write_all(handle, data)
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, mode 0755; those that are there stay as they are. Raises OSError."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        folder.chmod(FOLDER_MODE)


def check_free_space(folder: Path, needed_bytes: int, freed_bytes: int = 0) -> None:
    """Raise UserError unless the disk of `folder` (which need not exist yet) has room for `needed_bytes`.

    freed_bytes: will be removed there before.
    """
    with disk_errors(folder):
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free + freed_bytes
    if free < needed_bytes:
        raise UserError(
            f"{folder}: the conversion writes {needed_bytes / 1e9:.3f} GB but only {free / 1e9:.3f} GB are free there. "
            f"Free {(needed_bytes - free) / 1e9:.3f} GB, or choose a folder on another disk"
        )


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none. Raises as `disk_errors`."""
    with disk_errors(folder):
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def xxh3_128(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The xxh3-128 checksum of a file as 32 hex digits, read through one 8 MiB buffer.

    `progress` gets the bytes of every read. Raises as `disk_errors`.
    """
    digest, buffer = xxhash.xxh3_128(), bytearray(BUFFER_BYTES)
    view = memoryview(buffer)
    with disk_errors(path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """Four of these names, and how many more there are, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def write_manifest(folder: Path, entries: Mapping[str, FileRecord], extra: Mapping[str, Any]) -> None:
    """Write manifest.json: `files` {name: bytes}, `xxh3_128` {name: hex}, `tool`, and the keys of `extra`.

    Names are relative to `folder`, with "/" between folders. Raises as `disk_errors`.
    """
    content: dict[str, Any] = {
        "tool": {"name": TOOL, "version": __version__},
        "files": {name: entries[name].bytes for name in sorted(entries)},
        "xxh3_128": {name: entries[name].xxh3_128 for name in sorted(entries)},
    }
    if taken := content.keys() & extra.keys():
        raise ValueError(f"extra keys {sorted(taken)} are the manifest's own")
    atomic_write(folder / MANIFEST, json.dumps(content | dict(extra), indent=1).encode() + b"\n")


def check_manifest(folder: Path, *, progress: Callable[[int], None] | None = None, workers: int = 1) -> list[str]:
    """Read every file of a folder again and compare with its manifest: one line a problem, none when all is well.

    Problems: a file missing, of another size, with another checksum; a weight file or index that the manifest does not
    list. A checkpoint that training wrote has sizes only, which is logged. `progress` gets the bytes of every read,
    from `workers` threads. Raises UserError when there is no manifest or it is damaged, and as `disk_errors`.
    """
    manifest = read_manifest(folder)
    sizes, sums = manifest["files"], manifest.get("xxh3_128", {})
    if not sums:
        logger.warning("%s has no checksums: only names and sizes are compared", folder / MANIFEST)

    def problem(name: str) -> str | None:
        file = folder / name
        if not file.is_file():
            return f"{name}: missing"
        if (found := file.stat().st_size) != sizes[name]:
            return f"{name}: has {found} bytes, {sizes[name]} were written"
        if sums and (got := xxh3_128(file, progress)) != sums[name]:
            return f"{name}: its content changed: xxh3-128 is {got}, {sums[name]} was written"
        return None

    with disk_errors(folder), ThreadPoolExecutor(workers) as pool:
        found = [line for line in pool.map(problem, sizes) if line is not None]
        present = {relative(file, folder) for file in folder.rglob("*") if file.name.endswith(_LOADED)}
    return found + [
        f"{name}: no conversion wrote it, but a loader may read it" for name in sorted(present - set(sizes))
    ]


def has_checksums(folder: Path) -> bool:
    """Whether a folder has a manifest.json of this project with checksums, which `check_manifest` can compare.

    Another program's manifest.json is none, and neither is that of a checkpoint of training, which has sizes only.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["tool"]["name"] == TOOL and "xxh3_128" in manifest
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, checked. Raises UserError for none or a damaged one."""
    file = folder / MANIFEST
    if not file.is_file():
        unfinished = (folder / JOURNAL).is_file()
        cure = "the conversion into it did not finish: run it again with --resume" if unfinished else "check the path"
        raise UserError(f"{folder} has no {MANIFEST}, so there is nothing to compare with; {cure}")
    with disk_errors(file):
        text = file.read_bytes()
    try:
        manifest = json.loads(text)
        sizes, sums = manifest["files"], manifest.get("xxh3_128")
        sane = all(isinstance(size, int) and is_inside(name) for name, size in sizes.items())
        if not sane or (sums is not None and sums.keys() != sizes.keys()):
            raise ValueError("its entries do not fit together")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({error}): it is not what was written. Convert again, or copy the folder again"
        ) from None
    return manifest


def fp8_blocks(folder: Path) -> Blocks:
    """What became of the FP8 blocks of a conversion, by its manifest. Raises as `read_manifest`."""
    counts = read_manifest(folder).get("fp8_blocks") or {}
    return Blocks(int(counts.get("kept", 0)), int(counts.get("new", 0)))


def relative(path: Path, folder: Path) -> str:
    """The name of a file in a folder, with "/" between folders."""
    return path.relative_to(folder).as_posix()


def is_inside(name: str) -> bool:
    """Whether a relative name stays inside its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def fsync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all of it at the file's position."""
    view = memoryview(data)
    while view:  # a full disk shows as a short write first
        view = view[os.write(handle, view) :]
