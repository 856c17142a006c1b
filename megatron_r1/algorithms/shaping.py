"""Reward shaping by length: called where a completion's reward parts are put together."""

from __future__ import annotations

from megatron_r1.config.grpo import OverlongConfig


def overlong_penalty(length: int, config: OverlongConfig) -> float:
    """DAPO's soft overlong punishment, between -config.factor and 0, to be added to a reward.

    With L = max_length and C = buffer: 0 for length <= L - C; ((L - C) - length) / C for L - C <
    length <= L, which reaches -1 at L; -1 beyond L. All times `factor`.

    Args:
        length: number of response tokens.
        config: L, C and the factor, in tokens.

    Source: DAPO (arXiv 2503.14476) eq. 13; the factor is ours (1 is the paper).
    """
    start = config.max_length - config.buffer
    if length <= start:
        return 0.0
    if length > config.max_length:
        return -config.factor
    return config.factor * (start - length) / config.buffer
