"""When a loop has to end early, and how all ranks agree on it.

Asked for by SIGTERM (preemption, Ctrl-C through the launcher) or by a file called `stop` in the run directory.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType

from megatron_r1.parallel.world import World

logger = logging.getLogger(__name__)

STOP_FILE = "stop"


class Stopped(Exception):
    """The loop saved its state and ended before its last step, as asked."""


def forget_stop_file(run_dir: Path, world: World) -> None:
    """Remove the stop file that ended the attempt before this one, or this one would end at once. Collective."""
    file = run_dir / STOP_FILE
    if world.rank == 0 and file.exists():
        file.unlink()
        logger.info("removed %s, which had stopped an earlier attempt", file)
    world.any(False)  # no rank looks for the file before it is gone


class StopRequest:
    """Remembers a signal or finds the stop file; `agreed` is collective, so that every rank stops at the same step."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.file, self.world, self._signalled = run_dir / STOP_FILE, world, False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.world.any(self._signalled or self.file.exists())
