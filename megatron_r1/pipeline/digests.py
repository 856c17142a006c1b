"""What a stage has read and written, as digests: they tell whether something that depends on it has to run again.

No torch. Files that a stage has written are hashed whole; of the user's files above 64 MiB, the size and both ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint import folders
from megatron_r1.config.stages import ExportStage, LanguageModelStage, RewardModelStage, Stage
from megatron_r1.convert.manifest import MANIFEST
from megatron_r1.observe.rundir import StageDir, StageState

NOT_CONTENT = (MANIFEST, ".metadata", "common.pt")
"""Files of which equal contents have other bytes: torch's .metadata names the folder it was written in, and a pickle
like common.pt (schedule, cursor) follows which of its objects are one. The weights and moments are not in these."""
WHOLE = 64 << 20  # bytes of a user's file up to which it is hashed whole
_BLOCK = 1 << 20


def output_files(stage: Stage, folder: StageDir) -> list[Path]:
    """The files that others read of a finished stage, sorted: its last checkpoint, data, or Hugging Face folder; of an
    evaluation the scored answers.
    """
    if isinstance(stage, LanguageModelStage | RewardModelStage):
        newest = folders.latest(folder.checkpoints)
        roots = [] if newest is None else [newest]
    elif isinstance(stage, ExportStage):
        roots = [folder.hf]
    else:
        roots = [folder.data, folder.rollouts]
    found = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    return sorted(path for path in found if path.is_file() and path.name not in NOT_CONTENT)


def measure(paths: Sequence[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Path below `root` -> {"bytes", "sha256"} of each file."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(root))] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def missing(outputs: dict[str, dict[str, Any]], root: Path) -> list[str]:
    """Those of the recorded files that are gone or have another size."""
    return [name for name, known in outputs.items() if not _has(root / name, known["bytes"])]


def digest_of(state: StageState) -> str:
    """One digest of all that a finished stage has written, whatever folder it lies in."""
    return digest_of_text(json.dumps({name: known["sha256"] for name, known in sorted(state.outputs.items())}))


def digest_of_path(path: Path) -> str:
    """Of a user's file or folder, of large files size and both ends; "missing" where it is not there."""
    if path.is_file():
        return _digest_of_file(path)
    if not path.is_dir():
        return "missing"
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.name not in NOT_CONTENT)
    return digest_of_text("\n".join(f"{entry.relative_to(path)} {_digest_of_file(entry)}" for entry in files))


def _digest_of_file(path: Path) -> str:
    about = path.stat()
    return _digest_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _digest_of(path: Path, size: int, _: int) -> str:
    """Of the file as it is at this size and time: a start of a run asks for many files more than once."""
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        ends = [file.read(_BLOCK)]
        file.seek(-_BLOCK, 2)
        ends.append(file.read(_BLOCK))
    return _joined([str(size).encode(), *ends])


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def digest_of_text(text: str) -> str:
    """SHA-256 of a text."""
    return _joined([text.encode()])


def _joined(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
