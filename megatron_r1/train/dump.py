"""A batch on disk, for a person to find out what went wrong with it: written by the loops' checks just before they
end a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.observe.rundir import write_json
from megatron_r1.types import Sample


def dump_batch(path: Path, samples: Sequence[Sample], tokenizer: Tokenizer, about: Mapping[str, Any]) -> None:
    """Write `about` and, under "samples", every sequence of an optimizer step with all that its loss was given.

    JSON has no NaN and no infinity: such a number becomes text ("nan", "-inf"), wherever it stands. One rank writes.
    """
    rows = [
        {
            "token_ids": sample.token_ids,
            "prompt_length": sample.prompt_length,
            "advantage": sample.advantage,
            "text": tokenizer.decode(sample.token_ids),
            "rollout_log_probs": sample.rollout_log_probs,
            "old_log_probs": sample.old_log_probs,
            "reference_log_probs": sample.reference_log_probs,
            "loss_mask": sample.loss_mask,
            "routed_experts": None if sample.routed_experts is None else sample.routed_experts.tolist(),
        }
        for sample in samples
    ]
    write_json(path, _spelled({**about, "samples": rows}))


def _spelled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
