"""Checkpoint folders: all or nothing, retention, torn files named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import UserError


def write(root: Path, step: int, keep: int = 2) -> Path:
    target = folders.begin(root, step)
    (target / "weights.bin").write_bytes(bytes(range(100)))
    (target / "inner").mkdir()
    (target / "inner" / "more.json").write_text("{}")
    return folders.commit(target, {}, keep)


def test_commit_gives_the_final_name_and_records_sizes(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    final = write(root, 7)
    assert final == folders.folder(root, 7) == folders.latest(root) == root / "step-00000007"
    assert [p.name for p in root.iterdir()] == ["step-00000007"]
    assert json.loads((final / folders.MANIFEST).read_text()) == {"files": {"inner/more.json": 2, "weights.bin": 100}}
    folders.check(final)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        write(tmp_path, step, keep=2)
    assert folders.steps(tmp_path) == [15, 100]
    write(tmp_path, 101, keep=1)
    assert folders.steps(tmp_path) == [101]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000101"]


def test_what_is_no_complete_checkpoint_is_not_seen(tmp_path: Path) -> None:
    assert folders.steps(tmp_path / "nowhere") == [] and folders.latest(tmp_path) is None
    write(tmp_path, 3)
    for name in ("step-00000009.writing", "step-9", "notes", "step-000000090"):
        (tmp_path / name).mkdir()
    assert folders.steps(tmp_path) == [3]


def test_leftovers_of_killed_attempts_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 3)
    for step in (4, 6):
        left = folders.begin(tmp_path, step)
        (left / "half").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000006.writing"]
    assert list(folders.begin(tmp_path, 6).iterdir()) == []
    folders.check(folders.folder(tmp_path, 3))


def test_a_step_written_again_replaces_the_old_folder(tmp_path: Path) -> None:
    (write(tmp_path, 3) / "weights.bin").unlink()
    folders.check(write(tmp_path, 3))


@pytest.mark.parametrize("size", [99, 0, 101])
def test_a_torn_file_is_named(tmp_path: Path, size: int) -> None:
    final = write(tmp_path, 3)
    os.truncate(final / "weights.bin", size)
    with pytest.raises(UserError) as caught:
        folders.check(final)
    assert f"checkpoint {final} is damaged: weights.bin has {size} bytes instead of 100" in str(caught.value)
    assert "Remove that folder" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    final = write(tmp_path, 3)
    (final / "inner" / "more.json").unlink()
    with pytest.raises(UserError, match=r"damaged: inner/more\.json is missing"):
        folders.check(final)


@pytest.mark.parametrize("text", ["", '{"files": {"a', "[]", "{}"])
def test_a_torn_manifest_is_named(tmp_path: Path, text: str) -> None:
    final = write(tmp_path, 3)
    (final / folders.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"damaged: manifest\.json is not what was written"):
        folders.check(final)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a checkpoint of this project: it has no manifest\.json"):
        folders.check(tmp_path)


def test_a_failure_while_committing_leaves_no_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)
    target = folders.begin(tmp_path, 4)
    (target / "weights.bin").write_bytes(b"x")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folders.commit(target, {}, keep=1)
    assert folders.steps(tmp_path) == [3], "the older one is dropped only once the new one is there"
    folders.check(folders.folder(tmp_path, 3))
