"""Live progress of a stage on rank 0's terminal, or readable plain lines where the output is a
file.

On a terminal one block is redrawn in place; in a log (CI, Slurm) one aligned ASCII line is printed
every half minute, without control characters. No thread is started: the block is redrawn by
`update` and `phase`, so a reward that forks finds no locked lock.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_r1.observe.names import METRICS, format_value

Cell = str | int | float | None

SHOWN: dict[str, str] = {
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "reward/language": "language",
    "eval/pass_at_1": "pass@1",
    "loss/lm": "loss",
    "loss/pairwise": "loss",
    "reward_model/accuracy": "accuracy",
    "rollout/length": "length",
    "policy/kl": "kl",
    "sample/accepted": "accepted",
    "policy/entropy": "entropy",
    "rollout/tokens_per_second": "sampled tok/s",
    "train/tokens_per_second": "trained tok/s",
}
"""Metrics of the live view and their labels, in order; those that a stage never writes are left
out.
"""

_WIDTH = 7  # characters of a value in a plain line, so that columns stay aligned
_WINDOW = 64  # updates that the ETA looks back on: steps get slower as completions get longer


class Progress:
    """Progress of one stage; a context manager.

    Example: with Progress("r1-zero", 600, start_step=120) as progress: progress.update(121,
    {"reward/mean": 1.2}).
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        start_step: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """enabled: False on all ranks but one. interval: seconds between two plain lines (first and
        last always).
        """
        self._stage, self._total, self._step = stage, total_steps, start_step
        self._enabled, self._interval, self._clock = enabled, interval, clock
        self._stream = stream or sys.stdout
        self._values: dict[str, float] = {}
        self._phase: tuple[str, int, int] | None = None
        self._began = clock()
        self._history: deque[tuple[float, int]] = deque([(self._began, start_step)], maxlen=_WINDOW)
        self._printed_at: float | None = None
        self._printed_step = start_step - 1
        self._live: Live | None = None
        if enabled and is_terminal(self._stream):
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(self._block(), console=console, auto_refresh=False)
            self._live.start(refresh=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` optimizer steps are done. Metrics that a step leaves out keep their last value on
        show.
        """
        self._step, self._phase = step, None
        self._history.append((self._clock(), step))
        self._values.update((name, float(value)) for name, value in metrics.items() if name in SHOWN)
        self._show(due=step >= self._total)

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a step, e.g. ("rollout", 128, 512) completions."""
        self._phase = (name, done, total)
        self._show(due=False)

    def close(self) -> None:
        """Leave the last state on show; a second call does nothing."""
        if self._live is not None:
            self._phase = None
            self._live.update(self._block(), refresh=True)
            self._live.stop()
            self._live = None
        elif self._enabled and self._step > self._printed_step and len(self._history) > 1:
            self._phase = None
            self._print()
        self._enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def eta(self) -> float | None:
        """Seconds to go at the pace of the last steps; None before the first step of this attempt
        is done.
        """
        (then, first), (now, last) = self._history[0], self._history[-1]
        if last <= first:
            return None
        return (now - then) / (last - first) * max(self._total - last, 0)

    def _show(self, due: bool) -> None:
        if not self._enabled:
            return
        if self._live is not None:
            self._live.update(self._block(), refresh=True)
        elif due or self._printed_at is None or self._clock() - self._printed_at >= self._interval:
            self._print()

    def _print(self) -> None:
        self._printed_at = self._clock()
        if self._phase is None:
            self._printed_step = self._step
        self._stream.write(self.plain_line() + "\n")
        self._stream.flush()

    def _shown_values(self) -> list[tuple[str, str]]:
        return [
            (label, format_value(self._values[name], METRICS[name].unit))
            for name, label in SHOWN.items()
            if name in self._values
        ]

    def _share(self) -> float:
        return self._step / self._total if self._total else 1.0

    def plain_line(self) -> str:
        """The state as one line of plain ASCII."""
        digits = len(str(self._total))
        parts = [
            f"{self._stage:<12}",
            f"step {self._step:>{digits}}/{self._total} {self._share():>4.0%}",
        ]
        if self._phase is not None:
            name, done, total = self._phase
            parts.append(f"{name} {done}/{total}")
        else:
            parts += [f"{label} {value:>{_WIDTH}}" for label, value in self._shown_values()]
        parts += [f"elapsed {duration(self._clock() - self._began)}", f"eta {duration(self.eta())}"]
        return "  ".join(parts)

    def _block(self) -> Group:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=32)
        times = f"elapsed {duration(self._clock() - self._began)}  eta {duration(self.eta())}"
        steps = f"step {self._step}/{self._total} {self._share():.0%}"
        head.add_row(Text(self._stage, style="bold"), bar, steps, Text(times, style="dim"))
        if self._phase is not None:
            name, done, total = self._phase
            inner = ProgressBar(total=max(total, 1), completed=done, width=32)
            head.add_row(Text(f"  {name}", style="dim"), inner, f"{done}/{total}", "")
        values = Text()
        for label, value in self._shown_values():
            values.append(f"{label} ", style="dim").append(f"{value}   ", style="bold")
        return Group(head, values)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    stream: TextIO | None = None,
    *,
    words: Collection[str] = (),
) -> None:
    """Print a table: drawn on a terminal, aligned ASCII-framed text elsewhere. Floats get three
    digits. words: columns of text, aligned to the left as the first one is.
    """
    out = stream or sys.stdout
    texts = [[cell_text(cell) for cell in row] for row in rows]
    if is_terminal(out):
        drawn = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            drawn.add_column(Text(column), justify="right" if i and column not in words else "left")
        for row in texts:
            drawn.add_row(*(Text(cell) for cell in row))
        Console(file=out, force_terminal=True).print(drawn)
        return
    grid = [list(columns), *texts]
    widths = [max(len(row[i]) for row in grid) for i in range(len(columns))]
    lines = [
        "  ".join(
            f"{c:<{w}}" if i == 0 or columns[i] in words else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    out.write("\n".join([title, *(line.rstrip() for line in lines)]) + "\n")
    out.flush()


def cell_text(cell: Cell) -> str:
    """Text of a table's cell: None -> "-", floats with three significant digits, the rest as it
    is.
    """
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def duration(seconds: float | None) -> str:
    """ "0:07:03", "26:00:00", or "--:--" for None."""
    if seconds is None:
        return "--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def is_terminal(stream: TextIO) -> bool:
    """Whether in-place redrawing works; environment variables that force colour must not put codes
    into a log.
    """
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
