"""When a loop has to end early, and how all ranks agree on it.

Asked for by SIGTERM (preemption, Ctrl-C through the launcher) or by a file called `stop` in the run directory.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from megatron_r1.parallel.world import World


class Stopped(Exception):
    """The loop saved its state and ended before its last step, as asked."""


class StopRequest:
    """Remembers a signal or finds the stop file; `agreed` is collective, so that every rank stops at the same step."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.file, self.world, self._signalled = run_dir / "stop", world, False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.world.any(self._signalled or self.file.exists())
