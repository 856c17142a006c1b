"""The journal of an unfinished conversion, for --resume and --overwrite, and the lock on its folder. No torch."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.manifest import (
    JOURNAL,
    MANIFEST,
    MODE,
    PART,
    TOOL,
    Blocks,
    FileRecord,
    disk_errors,
    fsync_folder,
    has_checksums,
    is_inside,
    make_folder,
    read_manifest,
    relative,
    some,
    write_all,
    xxh3_128,
)

logger = logging.getLogger(__name__)


@dataclass
class Journal:
    """Which files of an unfinished conversion are whole: a line a file in `.conversion-journal.jsonl`, on disk at once.

    Its first line is {"files": [...]}, all the names that the conversion writes, so that --overwrite after a crash
    knows its own files; then {"file", "plan", "bytes", "xxh3_128"} for each finished one, with "fp8_blocks": [kept,
    quantised anew] where it has some. A line that cannot be read (torn by a crash) counts as not written.
    """

    folder: Path
    records: dict[str, tuple[str, FileRecord]] = field(default_factory=dict)  # name -> plan, record
    announced: set[str] = field(default_factory=set)
    lock: int = -1  # descriptor of the folder, locked while it is open

    @staticmethod
    def open(folder: Path, resume: bool, *, overwrite: bool = False, files: Iterable[str] = ()) -> Journal:
        """Take `folder` as the target of a conversion that will write `files` (names relative to it), and make it.

        resume: go on with what an unfinished conversion left; its files that are not among `files`, half-written ones
        and its manifest are removed. An empty or new folder is simply started. overwrite: remove what an earlier
        conversion wrote. Raises UserError when the folder holds something else, naming the cures; and as `disk_errors`.
        """
        if resume and overwrite:
            raise UserError(f"{folder}: --resume goes on with what is there, --overwrite removes it; give one of them")
        with disk_errors(folder):
            make_folder(folder)
            lock = _locked(folder)
        try:
            journal = Journal._take(folder, set(files), resume, overwrite)
        except BaseException:
            os.close(lock)
            raise
        journal.lock = lock
        return journal

    @staticmethod
    def _take(folder: Path, names: set[str], resume: bool, overwrite: bool) -> Journal:
        with disk_errors(folder):
            present = _all_files(folder)
            if overwrite:
                _remove_conversion(folder, present)
                present = set()
            has_journal = JOURNAL in present
            if present and not (resume and has_journal):
                raise UserError(_not_empty(folder, present, resume))
            journal = Journal(folder, *(_read_journal(folder / JOURNAL) if has_journal else ({}, set())))
            if present:
                stale = (journal.announced | journal.records.keys()) - names if names else set()
                for name in present:
                    if name in stale or name == MANIFEST or name.endswith(PART):
                        (folder / name).unlink()
            journal._append({"files": sorted(names)})
            fsync_folder(folder)
        return journal

    def done(self, file: str, plan: str) -> FileRecord | None:
        """What was recorded of `file`, if the same plan made it and it still has its size and checksum, for which it is
        read; else None: write it.
        """
        made_by, record = self.records.get(file, (None, None))
        path = self.folder / file
        if record is None or made_by != plan or not path.is_file() or path.stat().st_size != record.bytes:
            return None
        return record if xxh3_128(path) == record.xxh3_128 else None

    def add(self, file: str, plan: str, record: FileRecord) -> None:
        """Enter a file that lies whole under its final name; on disk on return. Raises as `disk_errors`."""
        line = {"file": file, "plan": plan, "bytes": record.bytes, "xxh3_128": record.xxh3_128}
        blocks = {"fp8_blocks": [record.blocks.kept, record.blocks.new]} if record.blocks else {}
        self._append({**line, **blocks})
        self.records[file] = (plan, record)

    def finish(self) -> None:
        """Remove the journal, once the manifest is written. Raises as `disk_errors`."""
        with disk_errors(self.folder):
            (self.folder / JOURNAL).unlink()
            fsync_folder(self.folder)

    def close(self) -> None:
        """Let another conversion have the folder; the journal stays unless it was finished."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def _append(self, line: dict[str, Any]) -> None:
        path = self.folder / JOURNAL
        with disk_errors(path), path.open("ab+", buffering=0) as file:
            os.fchmod(file.fileno(), MODE)
            end = file.tell()
            file.seek(max(0, end - 1))
            torn = end > 0 and file.read(1) != b"\n"  # close a torn line, so that this one is not lost with it
            write_all(file.fileno(), b"\n" * torn + json.dumps(line).encode() + b"\n")
            os.fsync(file.fileno())


def _locked(folder: Path) -> int:
    """A descriptor of the folder with an exclusive lock. Raises UserError when another process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{folder}: another conversion is writing there; wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:  # a file system without locks: go on without
        logger.debug("%s cannot be locked: %s", folder, error)
    return handle


def _read_journal(path: Path) -> tuple[dict[str, tuple[str, FileRecord]], set[str]]:
    records: dict[str, tuple[str, FileRecord]] = {}
    announced: set[str] = set()
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(raw) if raw else {"files": []}
            names = line["files"] if "files" in line else [line["file"]]
            if not all(is_inside(name) for name in names):
                raise ValueError("names a file outside the folder")
            if "file" in line:
                blocks = Blocks(*map(int, line.get("fp8_blocks", ())))
                records[line["file"]] = (line["plan"], FileRecord(int(line["bytes"]), str(line["xxh3_128"]), blocks))
            announced.update(names)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: a line is ignored (%s)", path, error)
    return records, announced


def _not_empty(folder: Path, present: set[str], resume: bool) -> str:
    if JOURNAL in present:
        return (
            f"{folder} holds an unfinished conversion: go on with --resume, replace it with --overwrite, or choose "
            "another folder"
        )
    if resume and MANIFEST in present:
        return (
            f"{folder} holds nothing to resume: another conversion, or one of other files, finished there. Use it, "
            "replace it with --overwrite, or choose another folder"
        )
    why = f"has no {JOURNAL}, so there is nothing to resume" if resume else f"is not empty ({some(present)})"
    return f"{folder} {why}. Choose another folder, or --overwrite to replace an earlier conversion"


def finished_files(folder: Path, plan: str) -> dict[str, FileRecord] | None:
    """The files of a conversion by this plan that finished in `folder`, as its manifest has them; None: there is none.

    plan: as `write.combined_hash` makes it.
    """
    if (folder / JOURNAL).exists() or not has_checksums(folder):
        return None
    try:
        manifest = read_manifest(folder)
    except UserError:  # damaged: what cannot be read proves nothing
        return None
    if manifest.get("plan") != plan:
        return None
    blocks = manifest.get("fp8_blocks", {}).get("files", {})
    return {
        name: FileRecord(size, manifest["xxh3_128"][name], Blocks(*blocks.get(name, ())))
        for name, size in manifest["files"].items()
    }


def reopen(folder: Path, plans: Mapping[str, str], files: Mapping[str, FileRecord]) -> None:
    """Make a finished conversion an unfinished one, so that --resume writes what was damaged since.

    plans: of its large files; files: as `finished_files` gives them. Raises as `disk_errors`.
    """
    journal = Journal(folder)
    journal._append({"files": sorted(files)})
    for name, plan in plans.items():
        journal.add(name, plan, files[name])


def foreign_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that no conversion wrote. Raises UserError for a damaged manifest."""
    with disk_errors(folder):
        return _foreign(folder, _all_files(folder)) if folder.is_dir() else set()


def _foreign(folder: Path, present: set[str]) -> set[str]:
    own: set[str] = set()
    if MANIFEST in present:
        manifest = read_manifest(folder)
        # A training checkpoint has a manifest.json too; it is not ours to remove.
        if isinstance(tool := manifest.get("tool"), dict) and tool.get("name") == TOOL:
            own |= {*manifest["files"], MANIFEST}
    if JOURNAL in present:
        own |= {*_read_journal(folder / JOURNAL)[1], JOURNAL, MANIFEST}
    return {name for name in present if name not in own and not name.endswith(PART)}


def _remove_conversion(folder: Path, present: set[str]) -> None:
    """Remove an earlier conversion, if the folder holds nothing else; what says whose the files are goes last."""
    if others := _foreign(folder, present):
        raise UserError(
            f"{folder} is not overwritten: no conversion wrote {some(others)}. Move them away, or choose another folder"
        )
    for name in sorted(present - {MANIFEST, JOURNAL}) + sorted(present & {MANIFEST, JOURNAL}):
        (folder / name).unlink()
    for parent in sorted({(folder / name).parent for name in present} - {folder}, reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()


def _all_files(folder: Path) -> set[str]:
    """Relative names of all that is no real folder; a link to a folder counts as a file."""
    return {relative(path, folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
