"""Work of rank 0 that may take hours while the other ranks wait: exports, judges that are asked, data that is mixed.

The others must not wait in one collective for as long as that takes: it would run into its time limit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.train.context import RunContext
from megatron_r1.train.stopping import Stopped

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0  # between two looks at whether rank 0 is done, or was asked to stop


def on_rank_0(work: Callable[[], Any], context: RunContext, name: str, kept: str) -> Any:
    """Run `work` in a thread of rank 0; returns its (picklable) result on all ranks. Collective.

    name: the stage. kept: what stays when it is stopped, e.g. "finished files stay". Raises on all ranks what `work`
    raises (UserError and RunFailed as they are), and Stopped when the run is asked to stop: the work is then left
    behind and must be safe to do again.
    """
    worker = _Worker(work, name) if context.world.rank == 0 else None
    if worker is not None:
        worker.start()
    while True:
        outcome = context.world.broadcast_from_0(None if worker is None else worker.look())
        if outcome is not None:
            break
        if context.stop.agreed():
            raise Stopped(f"stopped in stage {name}; {kept}")
    result, error = outcome
    if error is not None:
        raise error
    return result


class _Worker(threading.Thread):
    """Runs beside the main thread, which answers the other ranks meanwhile."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        super().__init__(daemon=True)  # a stopped run does not wait for it
        self.work, self.stage = work, name
        self.outcome: tuple[Any, Exception | None] | None = None

    def run(self) -> None:
        """Do the work, whatever comes of it."""
        try:
            self.outcome = self.work(), None
        except (UserError, RunFailed) as error:
            self.outcome = None, error
        except BaseException as error:  # the other ranks have to learn of it
            logger.exception("stage %s failed", self.stage)
            self.outcome = None, RunFailed(f"stage {self.stage} failed: {type(error).__name__}: {error}")

    def look(self) -> tuple[Any, Exception | None] | None:
        """What came of it, as soon as it is known; None after a while otherwise."""
        self.join(_LOOK_SECONDS)
        return self.outcome
