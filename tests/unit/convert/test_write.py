"""Whatever stops a conversion: files under their final names are whole, and --resume ends at the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from megatron_r1.cli import main
from megatron_r1.config.errors import UserError
from megatron_r1.convert.conversion import Conversion, import_conversion, run
from megatron_r1.convert.correspondence import Correspondence
from megatron_r1.convert.inspecting import planned_hf
from megatron_r1.convert.manifest import JOURNAL, MANIFEST, check_manifest
from tests.reference.synthetic_hf import FAMILIES, write_shards, write_tokenizer

CONFIG = {**FAMILIES["qwen2"], "vocab_size": 100, "torch_dtype": "bfloat16"}
SHARD_GB = 0.0004  # six files of the import
SHARD_BYTES = int(SHARD_GB * 1e9)


def no_progress(_: int) -> None:
    """For conversions that nobody watches."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint of 2 MB in three files."""
    folder = tmp_path_factory.mktemp("write") / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder, 100)
    archive = planned_hf(Correspondence(CONFIG), "bf16")
    draw = torch.Generator().manual_seed(0)
    tensors = {t.name: torch.randn(t.shape, generator=draw).bfloat16() for t in archive.tensors.values()}
    write_shards(folder, tensors, 3)
    return folder


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "hf"))


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an import of `original` writes when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole") / "megatron"
    run(converted(original), folder)
    return content(folder)


def converted(source: Path) -> Conversion:
    """The import whose files the tests watch."""
    return import_conversion(source, file_bytes=SHARD_BYTES)


def command(source: Path, target: Path, *more: str) -> int:
    """The same on the command line."""
    return main(["convert", "import", str(source), str(target), "--shard-gb", str(SHARD_GB), *more])


def content(folder: Path) -> dict[str, bytes]:
    """Every file by relative name."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def shards(folder: Path) -> list[Path]:
    """The large files that are finished."""
    return sorted(folder.glob("__0_*.distcp"))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the large files that are finished: what changes when one is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in shards(folder)}


def same_but_for_the_source(found: dict[str, bytes], due: dict[str, bytes], source: Path) -> None:
    """Assert that all bytes are the same; manifest.json names the folder that was converted, and its plan the files."""
    manifest = json.loads(due[MANIFEST]) | {"source": str(source), "plan": json.loads(found[MANIFEST])["plan"]}
    assert json.loads(found[MANIFEST]) == manifest
    assert {k: v for k, v in found.items() if k != MANIFEST} == {k: v for k, v in due.items() if k != MANIFEST}


def nothing_half(folder: Path, due: dict[str, bytes]) -> None:
    """Assert that what lies under a final name is whole, and that the folder does not look finished."""
    found = content(folder)
    assert MANIFEST not in found and ".metadata" not in found
    assert {name: due[name] for name in found if name in due} == {n: v for n, v in found.items() if n in due}
    assert found.keys() - due.keys() <= {JOURNAL}


OPERATIONS = ("pwrite", "write", "replace", "fsync", "unlink")


def counting(operation: Callable[..., Any], at: Callable[[], None]) -> Callable[..., Any]:
    """The operation, with a call of `at` before it."""

    def counted(*arguments: Any, **options: Any) -> Any:
        at()
        return operation(*arguments, **options)

    return counted


def killed(source: Path, target: Path, at: int) -> int:
    """Import in a process that kills itself (SIGKILL) before its `at`-th operation on the disk; returns how many it
    did.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        done = 0

        def count() -> None:
            nonlocal done
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            written(tell, b".")

        written = os.write
        try:
            for name in OPERATIONS:
                setattr(os, name, counting(getattr(os, name), count))
            run(converted(source), target)
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        done = len(file.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (done == at)
    return done


@pytest.fixture(scope="module")
def operations(original: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations an import is."""
    return killed(original, tmp_path_factory.mktemp("count") / "megatron", sys.maxsize)


@pytest.mark.parametrize("part", [*(i / 12 for i in range(12)), 0.97, 0.985, 1.0])
def test_a_kill_anywhere_leaves_only_whole_files_and_resume_ends_at_the_same_bytes(
    part: float, operations: int, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "megatron"
    at = min(int(part * operations), operations - 1)
    assert killed(source, target, at) == at
    found = content(target)
    assert {n: v for n, v in found.items() if n in whole and n != MANIFEST} == {
        n: whole[n] for n in found if n in whole and n != MANIFEST
    }
    if MANIFEST in found:
        assert found.keys() >= whole.keys()
    lines = [json.loads(line) for line in found.get(JOURNAL, b"").splitlines()]
    entered = {line["file"] for line in lines if "file" in line}
    before = {name: stamp for name, stamp in stamps(target).items() if name in entered}
    assert len(before) == len(entered)
    assert command(source, target, "--resume") == 0  # also where nothing is left to do
    assert stamps(target).items() >= before.items()
    same_but_for_the_source(content(target), whole, source)


def test_the_points_of_the_kills_are_inside_of_the_work(operations: int, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    killed(source, target, operations // 2)
    assert 1 < len(shards(target)) < 6
    assert [path.name for path in target.glob("*.part")], "the middle is not within a file"


def test_resume_makes_again_what_came_from_a_changed_file(
    source: Path, operations: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "megatron"
    killed(source, target, int(0.9 * operations))
    changed = source / "model-00002-of-00003.safetensors"
    files = {f.name: {p.file for t in f.targets for p in t.pieces} for f in converted(source).plan.files}
    before = stamps(target)
    stale = {name for name in before if str(changed) in files[name]}
    assert stale and stale != set(before)
    raw = bytearray(changed.read_bytes())
    raw[-1] ^= 1  # the same size: the time tells
    changed.write_bytes(raw)
    assert command(source, target, "--resume") == 0
    after = stamps(target)
    assert {name for name in before if after[name] != before[name]} == stale
    run(converted(source), tmp_path / "fresh")
    assert content(target) == content(tmp_path / "fresh") != whole


def test_resume_makes_again_what_another_plan_made(source: Path, operations: int, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    killed(source, target, int(0.9 * operations))
    assert command(source, target, "--resume", "--dtype", "fp32") == 0
    assert command(source, tmp_path / "fresh", "--dtype", "fp32") == 0
    assert content(target) == content(tmp_path / "fresh")


def test_resume_of_what_is_finished_checks_it_and_writes_nothing(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Any
) -> None:
    target = tmp_path / "megatron"
    assert command(source, target) == 0
    before = {name: (target / name).stat().st_mtime_ns for name in content(target)}
    for _ in range(2):
        capsys.readouterr()
        assert command(source, target, "--resume") == 0
        assert "finished before; every checksum is right, nothing was written" in capsys.readouterr().out
    assert {name: (target / name).stat().st_mtime_ns for name in content(target)} == before
    assert command(source, target) == 2 and "is not empty" in capsys.readouterr().err
    assert command(source, target, "--resume", "--dtype", "fp32") == 2
    assert "another conversion, or one of other files, finished there" in capsys.readouterr().err
    (source / "tokenizer_config.json").write_text("{}")  # a small file is part of the plan, too
    assert command(source, target, "--resume") == 2
    same_but_for_the_source(content(target), whole, source)


@pytest.mark.parametrize("name", ["__0_1.distcp", "hf/tokenizer.json", ".metadata"])
@pytest.mark.parametrize("gone", [False, True])
def test_resume_writes_again_what_was_damaged_since(
    name: str, gone: bool, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "megatron"
    assert command(source, target) == 0
    before = stamps(target)
    if gone:
        (target / name).unlink()
    else:
        flip(target / name)
    assert command(source, target, "--resume") == 0
    same_but_for_the_source(content(target), whole, source)
    assert {shard for shard, stamp in stamps(target).items() if stamp != before[shard]} == {name} & before.keys()


def test_resume_looks_at_the_bytes_of_finished_files(
    source: Path, operations: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "megatron"
    killed(source, target, int(0.9 * operations))
    before = stamps(target)
    damaged = shards(target)[1]
    flip(damaged)
    assert command(source, target, "--resume") == 0
    assert damaged.name in before
    assert {name for name in before if stamps(target)[name] != before[name]} == {damaged.name}
    same_but_for_the_source(content(target), whole, source)


def flip(file: Path) -> None:
    """Change one bit in the middle; its size stays."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_too_little_space_is_known_before_anything_is_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "megatron"
    assert command(source, target) == 0
    before = content(target)
    usage, room = shutil.disk_usage(tmp_path), 500_000 + sum(map(len, before.values()))
    left = lambda _: usage._replace(free=room - sum(map(len, content(target).values())))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", left)
    assert command(source, target, "--overwrite", "--dtype", "fp32") == 2  # twice the size
    assert "GB are free there" in capsys.readouterr().err
    assert content(target) == before
    assert command(source, target, "--overwrite") == 0  # what is removed is free then


def cut(file: Path) -> None:
    """A copy that ended early."""
    os.truncate(file, file.stat().st_size - 1000)


@pytest.mark.parametrize(("damage", "cure"), [(cut, "again"), (Path.unlink, "download or copy the rest")])
@pytest.mark.parametrize("also", [[], ["--resume"], ["--overwrite"]])
def test_a_source_that_is_cut_or_gone_is_refused_before_anything_is_written(
    damage: Callable[[Path], None], cure: str, also: list[str], source: Path, tmp_path: Path, capsys: Any
) -> None:
    damage(source / "model-00002-of-00003.safetensors")
    assert command(source, tmp_path / "megatron", *also) == 2
    message = capsys.readouterr().err
    assert "model-00002-of-00003.safetensors" in message and cure in message
    assert not (tmp_path / "megatron").exists()


def test_a_checkpoint_whose_file_is_cut_is_not_exported(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(source, tmp_path / "megatron") == 0
    cut(shards(tmp_path / "megatron")[1])
    assert main(["convert", "export", str(tmp_path / "megatron"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert shards(tmp_path / "megatron")[1].name in message and "copy it again" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_source_that_is_cut_meanwhile_is_named(
    source: Path, whole: dict[str, bytes], workers: int, tmp_path: Path
) -> None:
    conversion = converted(source)
    cut(source / "model-00003-of-00003.safetensors")
    with pytest.raises(UserError, match=r"model-00003-of-00003.safetensors ends at byte .* copy it again"):
        run(conversion, tmp_path / "megatron", workers=workers)
    nothing_half(tmp_path / "megatron", whole)


class Limited:
    """os.pwrite on a disk that takes so many bytes and then fails; like a real one it writes a part first."""

    def __init__(self, room: int, error: int) -> None:
        self.room, self.error, self.real, self.lock = room, error, os.pwrite, threading.Lock()

    def __call__(self, handle: int, data: memoryview, at: int) -> int:
        with self.lock:
            taken = min(len(data), self.room)
            self.room -= taken
        if not taken:
            raise OSError(self.error, os.strerror(self.error))
        return self.real(handle, data[:taken], at)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("room", [0, 500_000, 1_900_001])
@pytest.mark.parametrize(
    ("error", "cure"),
    [(errno.ENOSPC, "Free some and go on with --resume"), (errno.EDQUOT, "quota"), (errno.EROFS, "another folder")],
)
def test_a_disk_that_takes_no_more(
    error: int, cure: str, room: int, workers: int, source: Path, whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    target = tmp_path / "megatron"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Limited(room, error))
        assert command(source, target, "--workers", str(workers)) == 2
    message = capsys.readouterr().err
    assert f"{target}/__0_" in message and cure in message and os.strerror(error) in message
    assert "Traceback" not in message
    nothing_half(target, whole)
    assert command(source, target, "--resume") == 0
    same_but_for_the_source(content(target), whole, source)


def test_a_disk_that_is_too_small_is_known_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert command(source, tmp_path / "megatron") == 2
    assert "only 0.001 GB are free" in capsys.readouterr().err
    assert not shards(tmp_path / "megatron")


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_target_that_is_no_folder(below: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("mine")
    assert command(source, tmp_path / "file" / below) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "file" / below) in message and "folder" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("error", "status"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_a_source_that_cannot_be_read_is_what_the_message_names(
    error: int, status: int, source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    def fail(*_: Any) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "preadv", fail)
    assert command(source, tmp_path / "megatron") == status
    message = capsys.readouterr().err
    assert f"{source}/model-0000" in message and os.strerror(error) in message and "distcp" not in message
    nothing_half(tmp_path / "megatron", whole)


@pytest.mark.parametrize("workers", [2, 8])
def test_workers_write_the_same_bytes(workers: int, original: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[int] = []
    conversion = converted(original)
    run(conversion, tmp_path / "megatron", workers=workers, progress=seen.append)
    assert content(tmp_path / "megatron") == whole
    assert check_manifest(tmp_path / "megatron") == []
    assert sum(seen) == conversion.plan.bytes


def test_every_checksum_is_the_files(whole: dict[str, bytes]) -> None:
    manifest = json.loads(whole[MANIFEST])
    assert manifest["files"] == {name: len(data) for name, data in whole.items() if name != MANIFEST}
    assert manifest["xxh3_128"] == {n: xxhash.xxh3_128_hexdigest(data) for n, data in whole.items() if n != MANIFEST}
