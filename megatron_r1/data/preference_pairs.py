"""Preference pairs from files: what a pairwise reward model learns from (`data/reward_rows.py` batches them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_r1.config.data import PairsConfig
from megatron_r1.data.records import read_preference
from megatron_r1.data.reward_rows import RewardRows
from megatron_r1.types import PreferencePair


class PreferencePairs(RewardRows[PairsConfig, PreferencePair]):
    """Rows {prompt, chosen, rejected} as pairs."""

    thing: ClassVar[str] = "pair"

    def _read(self, row: Mapping[str, Any], name: str, where: str) -> PreferencePair:
        found = read_preference(row, self.config, where)
        chosen, rejected = self._sequences(found.prompt, (found.chosen, found.rejected), where)
        return PreferencePair(id=name, question=found.prompt, chosen=chosen, rejected=rejected)
