"""From logits to a token: temperature, top-k, top-p, and random numbers that belong to the completion.

The uniform number behind each token comes from a counter-based generator keyed by (seed, prompt id, completion
number), so a completion does not depend on which others share its batch, nor on the data-parallel split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from megatron_r1.config.optim import SamplingConfig

_CHUNK = 64
_ROUNDING = 1e-6  # of a sum of float32 probabilities


class UniformStreams:
    """One stream of uniform float64 numbers in [0, 1) per completion."""

    def __init__(self, seed: int, keys: Sequence[tuple[str, int]]) -> None:
        self._generators = [np.random.Generator(np.random.Philox(key=_key(seed, *key))) for key in keys]
        self._chunk_NC = np.empty((len(keys), 0))
        self._start = 0

    def at(self, position: int, rows: np.ndarray) -> torch.Tensor:
        """[len(rows)] number `position` of each of these streams; positions must not go back by a chunk."""
        while position >= self._start + self._chunk_NC.shape[1]:
            self._start += self._chunk_NC.shape[1]
            self._chunk_NC = np.stack([g.random(_CHUNK) for g in self._generators])
        return torch.from_numpy(self._chunk_NC[rows, position - self._start])


def _key(seed: int, prompt_id: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{number}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def sample_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: SamplingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution at `uniform_B`.

    logits_BV float, -inf where a token is impossible; uniform_B float64 in [0, 1). Returns (ids [B] int64, log-probs
    [B] float32 under the distribution drawn from, that is after temperature, top-k and top-p and renormalised).
    """
    log_probs_BV = torch.log_softmax(logits_BV.float() / sampling.temperature, dim=-1)
    order_BV = None
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        log_probs_BV, order_BV = _truncate(log_probs_BV, sampling)
    cumulative_BV = log_probs_BV.double().exp().cumsum(-1)
    target_B1 = (uniform_B.to(cumulative_BV.device) * cumulative_BV[:, -1])[:, None]
    picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=log_probs_BV.shape[-1] - 1)
    picked_log_probs_B = log_probs_BV.gather(-1, picked_B1)[:, 0]
    ids_B1 = picked_B1 if order_BV is None else order_BV.gather(-1, picked_B1)
    return ids_B1[:, 0], picked_log_probs_B


def _truncate(log_probs_BV: torch.Tensor, sampling: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted, renormalised log-probs with the tail at -inf, and the order they were sorted in."""
    sorted_BV, order_BV = log_probs_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k > 0:
        sorted_BV[:, sampling.top_k :] = -torch.inf
    if sampling.top_p < 1.0:
        probs_BV = torch.softmax(sorted_BV, dim=-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV  # the first token whose mass reaches top_p is still kept
        # A sum that is top_p but for rounding has reached it; the likeliest token, with nothing before, always stays.
        sorted_BV[before_BV >= max(sampling.top_p - _ROUNDING, _ROUNDING)] = -torch.inf
    return torch.log_softmax(sorted_BV, dim=-1), order_BV
