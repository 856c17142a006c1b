"""Limits on the mismatch between sampling engine and trainer that warn, or stop the run with the batch on disk.

Looked at by the GRPO loop after every optimizer step. Limits that mask act earlier, in `algorithms/mismatch.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1.config.errors import RunFailed
from megatron_r1.config.grpo import MismatchLimit
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.train.dump import dump_batch
from megatron_r1.types import Sample

logger = logging.getLogger(__name__)

WARN_EVERY = 20
"""A limit that stays exceeded is logged once in so many optimizer steps."""


class MismatchStop(RunFailed):
    """A limit with action "stop" was exceeded; the batch is on disk and the last checkpoint is untouched."""


class MismatchWatch:
    """The limits of one stage. Every rank checks and stops alike; one writes."""

    def __init__(
        self, stage: str, limits: Sequence[MismatchLimit], folder: Path, tokenizer: Tokenizer, *, writes: bool
    ) -> None:
        """folder: where the dump goes; writes: whether this rank logs and dumps (rank 0)."""
        self.stage, self.folder, self.tokenizer, self.writes = stage, folder, tokenizer, writes
        self.limits = [limit for limit in limits if limit.action != "mask"]
        self._warned: dict[str, int] = {}  # step of the last line for each kind of warning
        self._silent: dict[str, int] = {}  # steps since then that would have had the same line

    def check(self, step: int, metrics: Mapping[str, float], samples: Sequence[Sample]) -> None:
        """Look at the metrics of the optimizer step just taken, equal on all ranks.

        Warnings come first, so that a run that stops has said all it knows.

        Raises:
            MismatchStop: a limit that stops is exceeded; `mismatch-step-N.json` holds the batch and the metrics.
        """
        for limit in self.limits:
            if limit.metric not in metrics:
                self._warn(step, f"{limit.metric} was not measured, so that its mismatch_limit cannot act")
        exceeded = [x for x in self.limits if x.metric in metrics and x.exceeded_by(metrics[x.metric])]
        for limit in exceeded:
            if limit.action == "warn":
                self._warn(step, _words(limit), f" (it is {metrics[limit.metric]:.4g})")
        stops = [limit for limit in exceeded if limit.action == "stop"]
        if stops:
            self._stop(step, stops, metrics, samples)

    def _warn(self, step: int, text: str, value: str = "") -> None:
        if not self.writes:
            return
        last = self._warned.get(text)
        if last is not None and step - last < WARN_EVERY:
            self._silent[text] = self._silent.get(text, 0) + 1
            return
        since = self._silent.pop(text, 0)
        again = f"; so it was in {since} step(s) since step {last}" if since else ""
        logger.warning("stage %s, step %d: %s%s%s", self.stage, step, text, value, again)
        self._warned[text] = step

    def _stop(
        self, step: int, stops: Sequence[MismatchLimit], metrics: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        dump = self.folder / f"mismatch-step-{step:06d}.json"
        if self.writes:
            about = {"step": step, "limits": [limit.model_dump() for limit in stops], "metrics": dict(metrics)}
            dump_batch(dump, samples, self.tokenizer, about)
        found = "; ".join(f"{_words(limit)} (it is {metrics[limit.metric]:.4g})" for limit in stops)
        raise MismatchStop(
            f"stage {self.stage}, step {step}: {found}: the sampling engine's log-probs stray from the "
            f"trainer's. The batch is in {dump}; the newest checkpoint is from before it. Compare precision, expert "
            "routing and weight update of the two, correct for it ([stage.grpo.correction]), or move the limit "
            "([[stage.grpo.mismatch_limit]]), then run the same command again; with nothing changed it comes back to "
            "this very step, to the bit"
        )


def _words(limit: MismatchLimit) -> str:
    side = "below" if limit.above is None else "above"
    return f"{limit.metric} is {side} its limit of {limit.threshold:g}"
