"""Labelled answers from files: what a pointwise reward model learns from (`data/reward_rows.py` batches them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_r1.config.data import LabelsConfig
from megatron_r1.data.records import read_label
from megatron_r1.data.reward_rows import RewardRows
from megatron_r1.types import LabelledAnswer


class LabelledAnswers(RewardRows[LabelsConfig, LabelledAnswer]):
    """Rows {prompt, response, label} as labelled answers."""

    thing: ClassVar[str] = "labelled answer"

    def _read(self, row: Mapping[str, Any], name: str, where: str) -> LabelledAnswer:
        found = read_label(row, self.config, where)
        (sample,) = self._sequences(found.prompt, (found.response,), where)
        return LabelledAnswer(id=name, question=found.prompt, sample=sample, good=found.good)
