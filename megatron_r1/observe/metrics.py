"""Metrics of a stage: the same numbers as metrics.jsonl for programs and as TensorBoard events for
people.

The training loop's rank 0 calls `write` once a logged step. metrics.jsonl is flushed line by line,
so a kill costs at most the line being written, and that torn line is dropped at the next start. A
resume from the checkpoint of step s first calls `truncate_after(s)`: the curves then hold each step
once, as if nothing had happened.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.observe.names import check_names
from megatron_r1.observe.rundir import StageDir, write_text


class MetricsWriter:
    """Appends metrics of one stage; use it on one process only.

    A line is {"step": n, "time": seconds since 1970, "group/what": value, ...}. JSON has no NaN or
    infinity: such a value is written as null and named in "nonfinite": {"loss/policy": "nan"};
    `read_metrics` restores it.
    """

    def __init__(self, stage_dir: Path, attempt: int = 1) -> None:
        """Open (or go on with) stage_dir/metrics.jsonl; drops the torn last line that a kill may
        have left.
        """
        stage = StageDir(Path(stage_dir))
        self.path = stage.metrics
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _TensorBoard(stage.tensorboard, attempt)
        if self.path.exists():
            _keep_lines(self.path, up_to_step=None)
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and one TensorBoard event, both flushed.

        step: optimizer steps done. Raises ValueError for a name that `observe/names.py` does not
        list.
        """
        check_names(list(metrics))
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"step": int(step), "time": round(now, 3)}
        line.update((name, None if name in nonfinite else value) for name, value in values.items())
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()
        self._tensorboard.write(step, now, values)

    def truncate_after(self, step: int) -> int:
        """Drop everything written for steps > `step`; returns how many lines went. Call it before
        `write`.
        """
        self._stream.close()
        dropped = _keep_lines(self.path, up_to_step=step)
        self._stream = self.path.open("a", encoding="utf-8")
        self._tensorboard.purge_after(step)
        return dropped

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        self._stream.close()
        self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl in file order, NaN and infinities restored; a torn last line is left
    out.

    An absent file gives []. Raises UserError for a damaged line elsewhere.
    """
    return _rows(_whole_lines(path.read_bytes()), path) if path.exists() else []


def read_last_metrics(path: Path, most_bytes: int = 1 << 20) -> list[dict[str, Any]]:
    """The last lines of a metrics.jsonl, as `read_metrics` gives them: quick whatever the size of the file."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        begin = max(0, stream.seek(0, io.SEEK_END) - most_bytes)
        stream.seek(begin)
        data = stream.read()
    return _rows(_whole_lines(data if not begin else data.partition(b"\n")[2]), path)


def _rows(lines: list[str], path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        row = _parse(line, path)
        for name, value in row.pop("nonfinite", {}).items():
            row[name] = float(value)
        rows.append(row)
    return rows


def _parse(line: str, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        int(row["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged line {line[:80]!r} ({error}); every line is a JSON object "
            "with a `step`; delete the line and try again"
        ) from error
    return dict(row)


def _whole_lines(data: bytes) -> list[str]:
    # The newline is written last, so what follows the last newline is a line that a kill cut short,
    # or the NUL bytes that some file systems leave after a crash.
    whole, _, _ = data.rpartition(b"\n")
    return [line for line in whole.decode("utf-8", "replace").split("\n") if line]


def _keep_lines(path: Path, up_to_step: int | None) -> int:
    before = path.read_bytes()
    lines = _whole_lines(before)
    kept = [x for x in lines if up_to_step is None or _parse(x, path)["step"] <= up_to_step]
    text = "".join(f"{line}\n" for line in kept)
    if text.encode() != before:
        write_text(path, text)
    return len(lines) - len(kept)


class _TensorBoard:
    """TensorBoard's own event writer, opened at the first write so that a purge step can still be
    set.

    tensorboard is imported here and not at the top: it takes a second, and `report` and `status`
    never need it.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._purge_step: int | None = None
        self._writer: Any = None

    def purge_after(self, step: int) -> None:
        """TensorBoard is to forget the events of earlier attempts with steps > `step`."""
        self.close()
        self._purge_step = step + 1

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            self._open(now)
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self._writer.add_event(Event(wall_time=now, step=int(step), summary=summary))
        self._writer.flush()  # its own 120 s would lose the last minutes of a killed attempt

    def _open(self, now: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(self._folder), filename_suffix=f".attempt-{self._attempt}")
        if self._purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=now, step=self._purge_step, session_log=restart))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
