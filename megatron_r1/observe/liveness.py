"""Is somebody at work in this run directory? A lock that rank 0 holds, which the kernel lets go however it ends.

A state file cannot tell a run that was killed from one that works; a lock can, also from another container, and from
another machine where the file system shares locks (NFS does). `megatron-r1 status` asks, and a second run in the same
directory, which would write into the files of the first, is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.config.errors import UserError
from megatron_r1.observe.rundir import RunDir

logger = logging.getLogger(__name__)

_TAKEN = (errno.EAGAIN, errno.EACCES)
TRIES = 100
_PAUSE = 0.1  # a `status` that looks holds the lock for a moment, a killed run until its memory is freed


class Holder(NamedTuple):
    """What the lock says."""

    held: bool | None  # None: there is no lock, or the file system has none to give
    host: str  # that took it last


@contextlib.contextmanager
def at_work(run: RunDir) -> Iterator[None]:
    """Hold the run's lock during the body; only rank 0 does. On a file system without locks the run goes on without.

    Raises:
        UserError: another run holds it, for ten seconds.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with run.lock_file.open("a+", encoding="utf-8") as stream:
        for left in reversed(range(TRIES)):
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    logger.warning("%s cannot be locked (%s): `megatron-r1 status` has to guess", run.lock_file, error)
                    break
                if not left:
                    stream.seek(0)
                    host, _, process = stream.read(1000).strip().partition(" ")
                    raise UserError(
                        f"{run.path}: another run is at work in this directory (process {process} on {host}), and two "
                        "would write into each other's files; wait for it, stop it, or give another --run-dir"
                    ) from error
                time.sleep(_PAUSE)
        stream.truncate(0)
        stream.write(f"{socket.gethostname()} {os.getpid()}\n")
        stream.flush()
        yield


def holder(run: RunDir) -> Holder:
    """Who works in this run directory; changes nothing."""
    try:
        with run.lock_file.open("rb") as stream:
            host = stream.read(1000).decode("utf-8", "replace").partition(" ")[0]
            try:
                fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return Holder(True if error.errno in _TAKEN else None, host)
            return Holder(False, host)
    except OSError:
        return Holder(None, "")
