"""Atomic files, checksums, the journal: what damage is found, what a crash leaves, what is never removed."""

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
from megatron_r1.convert.journal import Journal, finished_files, foreign_files, reopen
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


@pytest.mark.parametrize("stop_after", range(6))
def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path, stop_after: int) -> None:
    first = convert(tmp_path / "x", stop_after=stop_after)
    if stop_after < len(CONTENT):
        assert JOURNAL in names(tmp_path / "x") and MANIFEST not in names(tmp_path / "x")
        (tmp_path / "x" / "half.safetensors.part").write_text("torn")
        assert first + convert(tmp_path / "x", resume=True) == list(CONTENT)
    assert names(tmp_path / "x") == {*CONTENT, MANIFEST}
    assert check_manifest(tmp_path / "x") == []


def test_a_record_counts_only_for_its_plan_and_its_content(tmp_path: Path) -> None:
    convert(tmp_path, stop_after=2)
    first, second, third = list(CONTENT)[:3]
    journal = Journal.open(tmp_path, True, files=CONTENT)
    assert journal.done(first, "plan1") == FileRecord(1000, xxhash.xxh3_128_hexdigest(CONTENT[first]))
    assert journal.done(first, "plan2") is None and journal.done(third, "plan1") is None
    flip_first(tmp_path / first)
    assert journal.done(first, "plan1") is None
    flip_first(tmp_path / first)
    assert journal.done(first, "plan1") is not None
    os.truncate(tmp_path / first, 999)
    assert journal.done(first, "plan1") is None
    (tmp_path / second).unlink()
    assert journal.done(second, "plan1") is None
    journal.add(second, "plan2", atomic_write(tmp_path / second, b"new"))
    again = Journal.open(tmp_path, True, files=CONTENT)
    assert again.done(second, "plan2") == FileRecord(3, xxhash.xxh3_128_hexdigest(b"new"))
    assert again.done(second, "plan1") is None


@pytest.mark.parametrize("cut", [1, 2, 20, 60, 95])
def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(tmp_path: Path, cut: int) -> None:
    convert(tmp_path, stop_after=3)
    first, second, third = list(CONTENT)[:3]
    lines = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(lines[:-cut])
    journal = Journal.open(tmp_path, True, files=[*CONTENT, "late"])
    assert [journal.done(name, "plan1") is not None for name in (first, second, third)] == [True, True, cut == 1]
    journal.add(third, "plan1", atomic_write(tmp_path / third, b"{}"))
    again = Journal.open(tmp_path, True)
    assert again.announced == {*CONTENT, "late"}
    assert again.done(third, "plan1") == FileRecord(2, xxhash.xxh3_128_hexdigest(b"{}"))
    assert convert(tmp_path, resume=True) == list(CONTENT)[3:]


@pytest.mark.parametrize(
    "line",
    ["\0\0\0", "[]", "3", '{"file": "a"}', '{"files": 3}', '{"file": "../x", "plan": "", "bytes": 1, "xxh3_128": ""}'],
)
def test_lines_that_cannot_be_read_count_as_not_written(tmp_path: Path, line: str) -> None:
    convert(tmp_path / "t", stop_after=2)
    file = tmp_path / "t" / JOURNAL
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    assert convert(tmp_path / "t", resume=True) == list(CONTENT)[2:]


def test_files_of_an_older_plan_and_a_manifest_go_on_resume(tmp_path: Path) -> None:
    convert(tmp_path, stop_after=2)
    (tmp_path / MANIFEST).write_text("{}")  # a kill between manifest and finish
    Journal.open(tmp_path, True, files=["model-00002-of-00002.safetensors", "other"])
    assert names(tmp_path) == {"model-00002-of-00002.safetensors", JOURNAL}


def test_resume_starts_an_empty_folder_and_refuses_a_finished_one(tmp_path: Path) -> None:
    assert convert(tmp_path / "x", resume=True) == list(CONTENT)
    with pytest.raises(UserError, match=r"nothing to resume: another conversion.*finished there.*--overwrite"):
        convert(tmp_path / "x", resume=True)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"nothing to resume\. Choose another folder"):
        convert(tmp_path / "y", resume=True)


def test_a_finished_conversion_is_known_by_its_plan(tmp_path: Path) -> None:
    assert finished_files(tmp_path, "p") is None
    records = {name: FileRecord(len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in CONTENT.items()}
    write_manifest(tmp_path, records, {"plan": "p"})
    assert finished_files(tmp_path, "p") == records
    assert finished_files(tmp_path, "q") is None
    (tmp_path / JOURNAL).write_text("")  # killed before it was removed
    assert finished_files(tmp_path, "p") is None
    (tmp_path / JOURNAL).unlink()
    (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text().replace('"files"', '"fields"'))
    assert finished_files(tmp_path, "p") is None


def test_a_reopened_conversion_writes_only_what_was_damaged(tmp_path: Path) -> None:
    convert(tmp_path)
    second = list(CONTENT)[1]
    records = {name: FileRecord(len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in CONTENT.items()}
    flip_first(tmp_path / second)
    reopen(tmp_path, dict.fromkeys(CONTENT, "plan1"), records)
    assert convert(tmp_path, resume=True) == [second]
    assert check_manifest(tmp_path) == [] and names(tmp_path) == {*CONTENT, MANIFEST}


def test_files_that_no_conversion_wrote(tmp_path: Path) -> None:
    assert foreign_files(tmp_path / "nowhere") == foreign_files(tmp_path) == set()
    for folder, stop_after in (("half", 2), ("whole", 99)):
        convert(tmp_path / folder, stop_after=stop_after)
        (tmp_path / folder / "x.part").write_text("torn")
        assert foreign_files(tmp_path / folder) == set()
        (tmp_path / folder / "notes").mkdir()
        (tmp_path / folder / "notes" / "thesis.txt").write_text("mine")
        (tmp_path / folder / "z.safetensors").write_text("mine")
        assert foreign_files(tmp_path / folder) == {"notes/thesis.txt", "z.safetensors"}


def test_a_folder_with_something_in_it_is_refused_with_the_cures(tmp_path: Path) -> None:
    convert(tmp_path / "x", stop_after=2)
    with pytest.raises(UserError, match="unfinished conversion: go on with --resume, replace it with --overwrite, or"):
        convert(tmp_path / "x")
    convert(tmp_path / "x", resume=True)
    with pytest.raises(UserError, match=r"is not empty \(chat_templates/x\.jinja, .* and 2 more\).*--overwrite"):
        convert(tmp_path / "x")
    with pytest.raises(UserError, match="give one of them"):
        convert(tmp_path / "x", resume=True, overwrite=True)
    assert check_manifest(tmp_path / "x") == []


@pytest.mark.parametrize("stop_after", [0, 1, 4, 99])
def test_overwrite_removes_an_earlier_conversion(tmp_path: Path, stop_after: int, monkeypatch: Any) -> None:
    convert(tmp_path, stop_after=stop_after)
    # Also what was renamed into place but not entered, and what was being written.
    (tmp_path / "chat_templates").mkdir(exist_ok=True)
    (tmp_path / "chat_templates" / "x.jinja").write_text("hello")
    (tmp_path / "chat_templates" / "y.part").write_text("torn")
    Journal.open(tmp_path, False, overwrite=True, files=["b"])
    assert names(tmp_path) == {JOURNAL} and not (tmp_path / "chat_templates").exists()
    monkeypatch.setitem(CONTENT, "b", b"")
    assert convert(tmp_path, resume=True) == list(CONTENT)


@pytest.mark.parametrize("stop_after", [2, 99])
def test_overwrite_removes_nothing_when_there_are_other_files(tmp_path: Path, stop_after: int) -> None:
    convert(tmp_path / "x", stop_after=stop_after)
    (tmp_path / "x" / "notes").mkdir()
    (tmp_path / "x" / "notes" / "thesis.txt").write_text("mine")
    before = names(tmp_path / "x")
    with pytest.raises(UserError, match=r"is not overwritten: no conversion wrote notes/thesis\.txt"):
        convert(tmp_path / "x", overwrite=True)
    assert names(tmp_path / "x") == before


def test_overwrite_keeps_off_what_it_cannot_know(tmp_path: Path) -> None:
    (tmp_path / "home" / "weights").mkdir(parents=True)
    (tmp_path / "home" / "weights" / "x.jinja").write_text("hello")
    # a checkpoint that training wrote
    written = folders.begin(tmp_path, 1)
    (written / "__0_0.distcp").write_bytes(b"x")
    final = folders.commit(written, {}, 1)
    with pytest.raises(UserError, match=r"no conversion wrote __0_0\.distcp, manifest\.json"):
        Journal.open(final, False, overwrite=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("")
    (tmp_path / "theirs" / MANIFEST).write_text('{"tool": {"name": "another"}, "files": {"x": 0}}')
    with pytest.raises(UserError, match=r"no conversion wrote manifest\.json, x"):
        Journal.open(tmp_path / "theirs", False, overwrite=True)
    # a manifest or a journal that names files elsewhere
    for name, text in {
        MANIFEST: '{"tool": {"name": "megatron_r1.convert"}, "files": {"../home/weights/x.jinja": 5}}',
        JOURNAL: '{"files": ["../home/weights/x.jinja"]}\n',
    }.items():
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        Journal.open(tmp_path / MANIFEST[:4], False, overwrite=True)
    Journal.open(tmp_path / JOURNAL[:4], False, overwrite=True)
    # a link to a folder, whose files seem to be inside
    convert(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "chat_templates")
    (tmp_path / "x" / "chat_templates").symlink_to(tmp_path / "home" / "weights")
    with pytest.raises(UserError, match="no conversion wrote chat_templates"):
        Journal.open(tmp_path / "x", False, overwrite=True)
    assert (tmp_path / "home" / "weights" / "x.jinja").read_text() == "hello" and folders.check(final) is None


def test_a_kill_while_overwriting_can_be_overwritten(tmp_path: Path, monkeypatch: Any) -> None:
    real = Path.unlink
    for kill_at in range(1, len(CONTENT) + 2):
        convert(tmp_path / "x")
        calls = iter(range(1, 99))

        def unlink(path: Path, missing_ok: bool = False, calls: Iterator[int] = calls, at: int = kill_at) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt
            real(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                Journal.open(tmp_path / "x", False, overwrite=True)
        assert convert(tmp_path / "x", overwrite=True) == list(CONTENT)
        shutil.rmtree(tmp_path / "x")


def test_the_lock_keeps_a_second_conversion_out_until_the_first_one_closes(tmp_path: Path) -> None:
    first = Journal.open(tmp_path, False)
    with pytest.raises(UserError, match="another conversion is writing there"):
        Journal.open(tmp_path, True)
    first.close()
    Journal.open(tmp_path, True).close()
    with pytest.raises(UserError, match="unfinished conversion"):
        Journal.open(tmp_path, False)
    Journal.open(tmp_path, False, overwrite=True).close()  # the refusal above left no lock behind
