"""Progress of a conversion on stderr: a bar with GB/s and the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_r1.observe.progress import is_terminal

_LINE_SECONDS = 10.0  # between two plain lines


@contextmanager
def byte_progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields what is called with bytes that are done; total: of them, where it is known."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if is_terminal(sys.stderr):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    lines = _Lines(title, total)
    yield lines.advance
    lines.close()


class _Lines:
    """Progress as plain lines, at most one in ten seconds and one at the end."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self.began = self.printed = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self.done += count
            if time.monotonic() - self.printed >= _LINE_SECONDS:
                self._print()

    def close(self) -> None:
        """The last line."""
        self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        seconds = max(self.printed - self.began, 1e-9)
        speed = self.done / seconds
        of, eta = "", ""
        if self.total:
            of = f" of {size_text(self.total)}"
            eta = f", {(self.total - self.done) / max(speed, 1):.0f} s left" if self.done < self.total else ""
        print(f"{self.title}: {size_text(self.done)}{of}, {speed / 1e9:.2f} GB/s{eta}", file=sys.stderr, flush=True)


def size_text(count: int) -> str:
    """So many bytes, for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
