"""Which checkpoints a stage has: complete folders, retention, and the manifest that tells a torn one. No torch.

A checkpoint is written into `step-N.writing` and renamed to `step-N` once every file is on disk with its size in
`manifest.json`; a folder under the final name is therefore complete unless something damaged it afterwards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.convert.formats.unpickle import read_pickle

MANIFEST = "manifest.json"
HEAD = "scalar_head.weight"  # as in model/scalar_head.py, which needs torch
_NAME = re.compile(r"step-(\d{8})")


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of this optimizer step lives."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    found = [match for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return sorted(int(match.group(1)) for match in found)


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = steps(root)
    return folder(root, found[-1]) if found else None


def begin(root: Path, step: int) -> Path:
    """An empty folder to write into, leftovers of killed attempts removed. Call on one rank."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("step-*.writing"):
        shutil.rmtree(leftover)
    target = root / f"step-{step:08d}.writing"
    target.mkdir()
    return target


def commit(written: Path, extra: Mapping[str, Any], keep: int) -> Path:
    """Add these JSON files, record the sizes, flush to disk, take the final name, drop all but the `keep` newest.

    Call on one rank.
    """
    for name, content in extra.items():
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).write_text(json.dumps(content, indent=2) + "\n")
    sizes = {str(f.relative_to(written)): f.stat().st_size for f in sorted(written.rglob("*")) if f.is_file()}
    (written / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1))
    for file in [*sizes, MANIFEST]:
        _fsync(written / file)
    _fsync(written)
    final = written.with_suffix("")
    if final.exists():
        shutil.rmtree(final)  # the same step saved again replaces the older one
    os.rename(written, final)
    _fsync(final.parent)
    for step in steps(final.parent)[:-keep]:
        shutil.rmtree(folder(final.parent, step))
    return final


def of_training(path: Path) -> bool:
    """Whether this is a checkpoint of a training stage, whole or torn; a conversion's manifest names its tool."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return _NAME.fullmatch(path.name) is not None
    return '"tool"' not in manifest.read_text()


def require_reward_model(path: Path) -> None:
    """Raise UserError unless this is a complete checkpoint of a reward_model stage."""
    if of_training(path):
        check(path)
        if holds_reward_model(path):
            return
    raise UserError(
        f"{path} holds no reward model: it has no scalar head ({HEAD}). Name a stage of kind "
        '"reward_model", its folder, or a checkpoint in it'
    )


def holds_reward_model(checkpoint: Path) -> bool:
    """Whether this checkpoint of training has a scalar head in the place of an output layer."""
    metadata = checkpoint / ".metadata"
    return metadata.is_file() and HEAD in read_pickle(metadata).state_dict_metadata


def check(path: Path) -> None:
    """Raise UserError unless `path` is a checkpoint with every file as long as it was written."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{path} is not a checkpoint of this project: it has no {MANIFEST}")
    try:
        files = dict(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged: {MANIFEST} is not what was written ({error}). Remove that folder to go "
            "on from an older checkpoint"
        ) from None
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(
                f"checkpoint {path} is damaged: {name} {state}. Remove that folder to go on from an older "
                "checkpoint, or restore the file"
            )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
