"""Atomic files and checksums: what is readable by whom, what damage is found."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_r1 import __version__
from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.convert import journal as journal_module
from megatron_r1.convert import manifest as module
from megatron_r1.convert.journal import Journal
from megatron_r1.convert.manifest import (
    JOURNAL,
    MANIFEST,
    FileRecord,
    atomic_write,
    check_free_space,
    check_manifest,
    disk_errors,
    has_checksums,
    replacing,
    write_manifest,
    xxh3_128,
)

CONTENT = {"model-00001-of-00002.safetensors": b"a" * 1000, "model-00002-of-00002.safetensors": b"b" * 77}
CONTENT |= {"config.json": b"{}\n", "chat_templates/x.jinja": b"hello", "empty.txt": b""}


@pytest.fixture(autouse=True)
def several_conversions(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A crashed process has released its lock; here its journal object lives on in the test's process."""
    if "lock" not in request.node.name:
        monkeypatch.setattr(journal_module, "_locked", lambda folder: os.open(folder, os.O_RDONLY))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def convert(folder: Path, *, stop_after: int = 99, resume: bool = False, overwrite: bool = False) -> list[str]:
    """What a conversion does; returns the files it wrote itself."""
    journal = Journal.open(folder, resume, overwrite=overwrite, files=CONTENT)
    records: dict[str, FileRecord] = {}
    wrote = []
    for name, data in CONTENT.items():
        record = journal.done(name, "plan1")
        if record is None:
            if len(wrote) == stop_after:
                return wrote  # killed
            (folder / name).parent.mkdir(exist_ok=True)
            record = atomic_write(folder / name, data)
            journal.add(name, "plan1", record)
            wrote.append(name)
        records[name] = record
    write_manifest(folder, records, {"source": "somewhere"})
    journal.finish()
    return wrote


# ------------------------------------------------------------------------------------------------- files and disks


@pytest.fixture
def private_umask() -> Iterator[None]:
    mask = os.umask(0o077)
    yield
    os.umask(mask)


def test_a_written_file_is_readable_by_all(tmp_path: Path, private_umask: None) -> None:
    convert(tmp_path / "new", stop_after=1)
    assert {(tmp_path / "new" / name).stat().st_mode & 0o777 for name in names(tmp_path / "new")} == {0o644}
    convert(tmp_path / "new", resume=True)
    assert {(tmp_path / "new" / name).stat().st_mode & 0o777 for name in names(tmp_path / "new")} == {0o644}


def test_new_folders_are_readable_by_all(tmp_path: Path, private_umask: None) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    convert(tmp_path / "mine" / "new" / "deep")
    new = [tmp_path / "mine" / name for name in ("new", "new/deep")]
    assert [folder.stat().st_mode & 0o777 for folder in new] == [0o755] * 2
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    record = atomic_write(file, b"old" * 100)
    assert record == FileRecord(300, xxhash.xxh3_128_hexdigest(b"old" * 100))
    with pytest.raises(ZeroDivisionError), replacing(file) as handle:
        os.write(handle, b"half")
        assert names(tmp_path) == {"x.bin", "x.bin.part"} and file.read_bytes() == b"old" * 100
        _ = 1 / 0
    assert names(tmp_path) == {"x.bin"} and file.read_bytes() == b"old" * 100
    with replacing(file) as handle:
        os.pwrite(handle, b"new", 5)
        assert os.pread(handle, 3, 5) == b"new"
    assert file.read_bytes() == b"\0" * 5 + b"new"


def test_every_file_and_its_folder_are_on_disk_before_it_counts(tmp_path: Path, monkeypatch: Any) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    synced = lambda handle: events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (synced(handle), real_fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b))[1])
    (tmp_path / "t").mkdir()
    atomic_write(tmp_path / "t" / "a", b"x")
    assert events == ["fsync a.part", "rename", "fsync t"]
    events.clear()
    journal = Journal.open(tmp_path / "t2", False)
    journal.add("a", "p", FileRecord(1, "x"))
    assert events == [f"fsync {JOURNAL}", "fsync t2", f"fsync {JOURNAL}"]


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, UserError, "no space is left there. .*--resume"),
        (errno.EDQUOT, UserError, "quota is used up"),
        (errno.EROFS, UserError, "read-only. Choose another folder"),
        (errno.EACCES, UserError, "Change its permissions"),
        (errno.EMFILE, UserError, "ulimit -n"),
        (errno.EIO, RunFailed, "Input/output error"),
    ],
)
def test_a_failing_disk_is_one_message_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: Any, number: int, kind: type[Exception], says: str
) -> None:
    def fail(handle: int, data: object) -> int:
        raise OSError(number, os.strerror(number))

    atomic_write(tmp_path / "x", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(kind, match=rf"{tmp_path}/x: .*{says}"):
            atomic_write(tmp_path / "x", b"new")
    assert names(tmp_path) == {"x"} and (tmp_path / "x").read_bytes() == b"old"


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: Any) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    atomic_write(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=rf"{tmp_path}/file: a file is where a folder should be"):
        Journal.open(tmp_path / "file", False)
    with pytest.raises(UserError, match="is a file, not a folder"):
        Journal.open(tmp_path / "file" / "inner", False)
    with pytest.raises(UserError, match="is a file, not a folder"):
        atomic_write(tmp_path / "file" / "x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="a folder is where a file should be"):
        atomic_write(tmp_path / "folder", b"")
    with pytest.raises(UserError, match=r"does not exist\. Check the spelling"), disk_errors(tmp_path):
        (tmp_path / "nowhere").read_bytes()


def test_too_little_space_is_known_before_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    check_free_space(tmp_path / "not" / "yet", 1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000_000))
    check_free_space(tmp_path / "a" / "b", 5_000_000_000)
    check_free_space(tmp_path / "a" / "b", 7_500_000_000, freed_bytes=2_500_000_000)
    with pytest.raises(UserError, match=r"writes 7\.500 GB but only 5\.000 GB are free there. Free 2\.500 GB"):
        check_free_space(tmp_path / "a" / "b", 7_500_000_000)


# -------------------------------------------------------------------------------------------------------- manifest


def test_a_checksum_is_the_librarys_over_many_buffers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    data = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(data)
    seen: list[int] = []
    assert xxh3_128(tmp_path / "x", seen.append) == xxhash.xxh3_128_hexdigest(data)
    assert seen == [1000] * 10 + [240]


def test_a_manifest_is_what_training_checks_and_more(tmp_path: Path) -> None:
    assert convert(tmp_path / "x") == list(CONTENT)
    content = json.loads((tmp_path / "x" / MANIFEST).read_text())
    assert content["files"] == {name: len(data) for name, data in CONTENT.items()}
    assert content["xxh3_128"] == {name: xxhash.xxh3_128_hexdigest(data) for name, data in CONTENT.items()}
    assert content["tool"] == {"name": "megatron_r1.convert", "version": __version__}
    assert content["source"] == "somewhere" and names(tmp_path / "x") == {*CONTENT, MANIFEST}
    folders.check(tmp_path / "x")
    with pytest.raises(ValueError, match="files"):
        write_manifest(tmp_path, {}, {"files": {}})


SHARD = "model-00001-of-00002.safetensors"


def flip_first(file: Path) -> None:
    """Change the lowest bit of the first byte, or change it back."""
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def flip(folder: Path) -> None:
    with open(folder / SHARD, "r+b") as file:
        file.seek(517)
        file.write(b"b")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "none": (lambda f: None, []),
    "flipped byte": (flip, [f"{SHARD}: its content changed: xxh3-128 is "]),
    "truncated": (lambda f: os.truncate(f / SHARD, 999), [f"{SHARD}: has 999 bytes, 1000 were written"]),
    "longer": (lambda f: os.truncate(f / SHARD, 1001), [f"{SHARD}: has 1001 bytes, 1000 were written"]),
    "missing": (lambda f: (f / "chat_templates/x.jinja").unlink(), ["chat_templates/x.jinja: missing"]),
    "extra weights": (
        lambda f: [(f / name).write_text("") for name in ("z.safetensors", "__0_9.distcp", "chat_templates/y.distcp")],
        [f"{name}: no conversion wrote it" for name in ("__0_9.distcp", "chat_templates/y.distcp", "z.safetensors")],
    ),
    "extra index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json: no conversion wrote it"],
    ),
    "harmless extra": (lambda f: (f / "README.md").write_text("mine"), []),
    "two at once": (lambda f: (flip(f), (f / "config.json").unlink()), ["config.json: missing", f"{SHARD}: its con"]),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(tmp_path: Path, name: str, workers: int) -> None:
    damage, expected = DAMAGE[name]
    convert(tmp_path)
    damage(tmp_path)
    found = check_manifest(tmp_path, workers=workers)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    convert(tmp_path)
    seen: list[int] = []
    assert check_manifest(tmp_path, progress=seen.append, workers=2) == []
    assert sum(seen) == sum(map(len, CONTENT.values()))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"files": 3}', '{"files": {"a": "b"}}', '{"files": {"../a": 1}}', '{"files": {"/etc/a": 1}}'),
        *('{"files": {"a": 1}, "xxh3_128": {}}', '{"files": {"a": 1}, "xxh3_128": 3}', "\xff"),
    ],
)
def test_no_or_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=f"has no {MANIFEST}.*check the path"):
        check_manifest(tmp_path)
    (tmp_path / JOURNAL).write_text("")
    with pytest.raises(UserError, match=f"has no {MANIFEST}.*--resume"):
        check_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
        check_manifest(tmp_path)


def test_a_checkpoint_of_training_is_compared_by_size(tmp_path: Path, caplog: Any) -> None:
    target = folders.begin(tmp_path, 1)
    (target / "__0_0.distcp").write_bytes(b"x" * 10)
    final = folders.commit(target, {}, 1)
    with caplog.at_level(logging.WARNING):
        assert check_manifest(final) == []
    assert "has no checksums" in caplog.text
    os.truncate(final / "__0_0.distcp", 9)
    assert check_manifest(final) == ["__0_0.distcp: has 9 bytes, 10 were written"]


def test_whose_checksums_can_be_compared(tmp_path: Path) -> None:
    assert not has_checksums(tmp_path)
    convert(tmp_path / "ours")
    assert has_checksums(tmp_path / "ours")
    for text in ('{"files": {}}', "[]", "{", '{"tool": 3}', '{"tool": {"name": "other"}, "xxh3_128": {}}', "[[]]"):
        (tmp_path / MANIFEST).write_text(text)
        assert not has_checksums(tmp_path)


# --------------------------------------------------------------------------------------------------------- journal
