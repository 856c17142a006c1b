"""Values from a reward model behind `megatron-r1 serve`: the client's side of `pipeline/outputs/serve.py`.

Used by `train/reward_models.py` for rewards that name a `url`. A server that is away for a while is asked again; one
that stays away ends the run, which loses nothing but the phase in hand: the same command samples it anew.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_r1.config.errors import RunFailed

logger = logging.getLogger(__name__)

BATCH = 512
"""Answers of one request."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds between two attempts; each pause is twice the one before."""
LOOK = 5.0
"""Seconds that a server may take to say which checkpoint it has."""


class Item(NamedTuple):
    """What a value is asked for: a question without its template, and the text to be scored."""

    prompt: str
    response: str


class RewardClient:
    """One server. Proxies of the environment are not used: reward models stand in the same cluster.

    name: of the reward, for messages; url: its address; timeout: seconds a request may take, retries included. `note`
    is told of every checkpoint that answers and is not the one before.
    """

    def __init__(self, name: str, url: str, timeout: float) -> None:
        self.name, self.url, self.timeout = name, url.rstrip("/"), timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._checkpoint: str | None = None
        self.note: Callable[[str], None] = lambda checkpoint: None

    def look(self) -> None:
        """Ask who is there, before anything is scored. One that is not there yet is warned of: it may come in time."""
        try:
            with self._opener.open(f"{self.url}/health", timeout=min(LOOK, self.timeout)) as answer:
                self._scores_with(str(json.loads(answer.read())["checkpoint"]))
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            logger.warning(
                "%s does not say what it is (GET /health: %s); it is not needed before it is first asked for values. "
                "Start it with megatron-r1 serve RUN STAGE",
                *(self._who, problem),
            )

    def score(self, items: Sequence[Item]) -> tuple[list[float], int]:
        """The values of the items, in their order, and how many answers were too long and scored cut.

        Raises:
            RunFailed: no answer within the time, an answer that makes no sense, or a request that the server refuses.
        """
        values: list[float] = []
        cut = 0
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            body = json.dumps({"items": [item._asdict() for item in part]}).encode()
            found, longer = self._understood(self._ask(body), len(part))
            values += found
            cut += longer
        return values, cut

    def _ask(self, body: bytes) -> bytes:
        deadline, pause, attempts = time.monotonic() + self.timeout, FIRST_PAUSE, 0
        request = urllib.request.Request(f"{self.url}/score", body, {"Content-Type": "application/json"})
        while True:
            left = deadline - time.monotonic()
            attempts += 1
            try:
                with self._opener.open(request, timeout=max(0.001, left)) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                said = _said(error.read())
                if error.code < 500 and error.code != 429:
                    raise RunFailed(f"{self._who} refused a request ({error.code}): {said}") from error
                problem = f"{error.code}: {said}"
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if time.monotonic() + pause > deadline:
                raise RunFailed(
                    f"{self._who} gave no values within timeout = {self.timeout:g} s ({attempts} attempts, the last: "
                    f"{problem}). Start it (megatron-r1 serve RUN STAGE) or mend `url`, then run the same command "
                    "again: it goes on from the last checkpoint"
                )
            if attempts == 1:
                logger.warning("%s: %s; asking again for %.0f s", self._who, problem, max(0.0, left))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _understood(self, answer: bytes, number: int) -> tuple[list[float], int]:
        try:
            found: dict[str, Any] = json.loads(answer)
            values, cut = [float(value) for value in found["values"]], int(found["cut"])
            checkpoint = str(found["checkpoint"])
        except (ValueError, KeyError, TypeError) as error:
            shown = answer[:200].decode("utf-8", "replace")
            raise RunFailed(f"{self._who} gave no values: {shown!r}; is it `megatron-r1 serve`?") from error
        if len(values) != number or not all(map(math.isfinite, values)):
            raise RunFailed(f"{self._who} gave {len(values)} values for {number} answers, or some that are not finite")
        self._scores_with(checkpoint)
        return values, cut

    def _scores_with(self, checkpoint: str) -> None:
        if checkpoint == self._checkpoint:
            return
        if self._checkpoint is None:
            logger.info("%s scores with %s", self._who, checkpoint)
        else:
            logger.warning("%s now scores with %s, before with %s", self._who, checkpoint, self._checkpoint)
        self._checkpoint = checkpoint
        self.note(checkpoint)

    @property
    def _who(self) -> str:
        return f"the reward model {self.name!r} at {self.url}"


def _said(body: bytes) -> str:
    """What a refusal says: its "error", or its text."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        return text[:500]
    return str(found["error"])[:500] if isinstance(found, dict) and "error" in found else text[:500]
