"""Is the policy hacking a reward model? Its mean value rises while the accuracy of the rule-judged prompts falls.

DeepSeek-R1 (arXiv 2501.12948, v2 appendix B.5, figure 6): with more steps of model rewards the helpful reward keeps
rising while Codeforces falls; so the paper gives preference rewards in the last 400 of 1,700 steps only. The GRPO loop
asks once a rollout phase. All state is what metrics.jsonl holds, so a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_r1.config.grpo import RewardWatchConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.observe.metrics import read_metrics
from megatron_r1.observe.panels import watch_charts
from megatron_r1.observe.rundir import StageDir, write_text

logger = logging.getLogger(__name__)

FLAG = "reward/hacking_watch"
ACCURACY = "reward/accuracy"

Row = Mapping[str, float]
"""Metrics of one rollout phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How a reward model's mean value and the accuracy moved from the first window to the last."""

    values: tuple[float, float]  # mean value: first window, last window
    spread: float  # standard deviation of the values in the first window
    accuracy: tuple[float, float]

    @property
    def rise(self) -> float:
        """Of the mean value, in standard deviations; infinite where all values of the first window were equal."""
        change = self.values[1] - self.values[0]
        return change / self.spread if self.spread else math.copysign(math.inf, change) if change else 0.0

    def exceeds(self, config: RewardWatchConfig) -> bool:
        """Whether the value rose and the accuracy fell by as much as counts."""
        fall = self.accuracy[0] - self.accuracy[1]
        return self.rise > 0 and self.rise >= config.rise and fall > 0 and fall >= config.fall


def drift(rows: Sequence[Row], name: str, window: int) -> Drift | None:
    """What happened between the first and the last phases in which reward model `name` scored and accuracy was judged.

    The windows never overlap: with fewer than 2 x window phases each is half of them. None with fewer than `window`
    phases, or fewer than two.
    """
    value, std = f"reward/model/{name}", f"reward/model_std/{name}"
    known = [row for row in rows if all(math.isfinite(row.get(key, math.nan)) for key in (value, std, ACCURACY))]
    size = min(window, len(known) // 2)
    if len(known) < max(2, window):
        return None
    first, last = known[:size], known[-size:]

    def mean(part: Sequence[Row], key: str) -> float:
        return statistics.fmean(row[key] for row in part)

    return Drift(
        values=(mean(first, value), mean(last, value)),
        spread=math.sqrt(statistics.fmean(row[std] ** 2 for row in first)),
        accuracy=(mean(first, ACCURACY), mean(last, ACCURACY)),
    )


class RewardWatch:
    """The watch of one stage; does nothing in a stage without reward models. Only rank 0 knows the phases before."""

    def __init__(self, stage: GrpoStage, folder: StageDir) -> None:
        self.stage, self.folder = stage, folder
        self.names = [reward.label for reward in stage.reward if reward.kind == "model"]
        self.rows: list[dict[str, float]] = []  # of the phases in which a reward model scored
        self.writes = False

    def resume(self) -> None:
        """Take up what the stage's metrics hold. To be called on rank 0, which also warns and draws from then on."""
        self.writes = True
        if self.names:
            self.rows = [row for row in read_metrics(self.folder.metrics) if self._scored(row)]

    def seen(self, step: int, metrics: Row) -> dict[str, float]:
        """The metrics of the phase whose first optimizer step is `step`, with the watch's own: 1 where it is alarmed.

        Warns when the alarm begins, and redraws `reward-hacking.svg`.
        """
        found = dict(metrics)
        if not self.writes or not self._scored(metrics):
            return found
        alarmed = bool(self.rows) and self.rows[-1].get(FLAG, 0.0) > 0
        self.rows.append({"step": float(step), **metrics})
        drifts = {name: drift(self.rows, name, self.stage.watch.window) for name in self.names}
        hacked = {name: d for name, d in drifts.items() if d is not None and d.exceeds(self.stage.watch)}
        found[FLAG] = self.rows[-1][FLAG] = float(bool(hacked))
        plot = self.folder.path / "reward-hacking.svg"
        write_text(plot, watch_charts(self.rows, self.names))
        if hacked and not alarmed:
            logger.warning(
                "stage %s, step %d: reward hacking? %s. See %s; fewer steps with this reward (last_steps), a smaller "
                "weight or a larger grpo.loss.kl_coefficient help",
                *(self.stage.name, step, "; ".join(_words(name, d) for name, d in hacked.items()), plot),
            )
        return found

    def _scored(self, row: Row) -> bool:
        return any(f"reward/model/{name}" in row for name in self.names)


def _words(name: str, found: Drift) -> str:
    before, now = found.values
    right, wrong = found.accuracy
    return (
        f"the mean value of reward model {name!r} rose from {before:.3g} to {now:.3g} ({found.rise:.2g} standard "
        f"deviations) while accuracy fell from {100 * right:.1f}% to {100 * wrong:.1f}%"
    )
