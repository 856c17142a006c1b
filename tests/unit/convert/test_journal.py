"""The journal of a conversion: what a crash leaves, what resume trusts, what overwrite never removes, the lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_r1.checkpoint import folders
from megatron_r1.config.errors import UserError
from megatron_r1.convert import journal as journal_module
from megatron_r1.convert.journal import Journal, finished_files, foreign_files, reopen
from megatron_r1.convert.manifest import (
    JOURNAL,
    MANIFEST,
    FileRecord,
    atomic_write,
    check_manifest,
    write_manifest,
)
from tests.unit.convert.test_manifest import CONTENT, convert, flip_first, names


@pytest.fixture(autouse=True)
def several_conversions(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A crashed process has released its lock; here its journal object lives on in the test's process."""
    if "lock" not in request.node.name:
        monkeypatch.setattr(journal_module, "_locked", lambda folder: os.open(folder, os.O_RDONLY))


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
