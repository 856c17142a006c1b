"""Log-probs, entropy and sampling supports from their definitions, in float64."""

from __future__ import annotations

import torch


def slow_log_probs(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, vocab: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-prob of each target, entropy) [B, T] of softmax(logits[..., :vocab] / temperature)."""
    log_probs_BTV = torch.log_softmax(logits_BTV[..., :vocab].double() / temperature, dim=-1)
    entropy_BT = -(log_probs_BTV.exp() * log_probs_BTV).sum(-1)
    return log_probs_BTV.gather(-1, targets_BT[..., None])[..., 0], entropy_BT


def sampling_distribution(logits_V: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after temperature, then top-k, then top-p on what is left, then renormalised.

    Equal logits are taken in the order of their ids; top-p keeps the smallest prefix whose mass reaches it.
    """
    probs = torch.softmax(torch.tensor(logits_V, dtype=torch.float64) / temperature, dim=-1).tolist()
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept = [i for i in order if probs[i] > 0][: top_k or None]
    total, mass, support = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if top_p < 1 and mass >= top_p - 1e-12:
            break
        support.append(i)
        mass += probs[i] / total
    total = sum(probs[i] for i in support)
    return [probs[i] / total if i in support else 0.0 for i in range(len(probs))]
