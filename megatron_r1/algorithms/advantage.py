"""Group advantages: after the rewards and the group filters, before samples become batches.

Letters: G completions of one group.
Source: DeepSeek-R1 (arXiv 2501.12948) eq. 3; Dr. GRPO for scale = "none".
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.config.grpo import AdvantageConfig

EQUAL_REWARD_TOLERANCE = 1e-7
"""Rewards of a group that lie within this, times max(1, largest |reward|), are equal: totals are
sums of floats, and 0.1 + 0.2 against 0.3 is no signal, while the finest real step of a reward (one
word or token of a response) is far larger."""


def has_signal(rewards_G: Tensor) -> bool:
    """Whether the rewards of a group differ by more than `EQUAL_REWARD_TOLERANCE`.

    Args:
        rewards_G: [G] total rewards, any float or integer dtype. G = 0 and G = 1 have no signal.

    Raises:
        ValueError: rewards_G is not one-dimensional, or holds NaN or infinity.
    """
    rewards = _checked(rewards_G)
    if rewards.numel() < 2:
        return False
    spread = (rewards.max() - rewards.min()).item()
    return spread > EQUAL_REWARD_TOLERANCE * max(1.0, rewards.abs().max().item())


def group_advantages(rewards_G: Tensor, config: AdvantageConfig) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + epsilon), or r_i - mean(r) with scale = "none".

    A group without signal gets exact zeros, whatever the epsilon. Computed in float64.

    Args:
        rewards_G: [G] total rewards of one group, any float or integer dtype.
        config: which standard deviation, and its epsilon.

    Returns:
        [G] float32, on the device of the rewards.

    Raises:
        ValueError: rewards_G is not one-dimensional, or holds NaN or infinity.

    Source: DeepSeek-R1 (arXiv 2501.12948) eq. 3. The paper states neither the kind of standard
    deviation nor an epsilon; `AdvantageConfig` does.
    """
    if not has_signal(rewards_G):
        return torch.zeros(rewards_G.shape, dtype=torch.float32, device=rewards_G.device)
    rewards = rewards_G.double()
    advantages = rewards - rewards.mean()
    if config.scale == "std":
        std = rewards.std(correction=0 if config.std == "population" else 1)
        advantages = advantages / (std + config.epsilon)
    return advantages.float()


def _checked(rewards_G: Tensor) -> Tensor:
    """The rewards in float64, refused when they cannot be the rewards of one group."""
    if rewards_G.dim() != 1:
        raise ValueError(f"rewards of one group must have shape [G], got {tuple(rewards_G.shape)}")
    if not torch.isfinite(rewards_G).all():
        raise ValueError(f"rewards of a group must be finite, got {rewards_G.tolist()}")
    return rewards_G.double()
