"""Per-token estimators of KL(policy || reference), for the loss and for logging.

With tokens sampled from the policy and d = log policy - log reference (Schulman's names):

| kind | value        | estimates the KL                  | derivative by log policy   |
|------|--------------|-----------------------------------|----------------------------|
| k1   | d            | unbiased, high variance, any sign | 1: nothing in expectation  |
| k2   | d^2 / 2      | biased, low variance, >= 0        | d: the reverse KL's        |
| k3   | e^-d + d - 1 | unbiased, low variance, >= 0      | 1 - e^-d: the forward KL's |

The last column says what a loss term does when its tokens are on-policy: k1 constrains nothing, k2
has exactly the gradient of KL(policy || reference), k3 that of KL(reference || policy).

k3's gradient agrees with the reverse KL's to first order around d = 0 and is unbounded where the
reference is far more probable than the policy. The paper's objective (arXiv 2501.12948 eq. 2) uses
k3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, kind: KlKind) -> Tensor:
    """The estimator `kind` at every token, unclamped and differentiable in `log_probs`.

    Args:
        log_probs: natural log-probs of the sampled tokens under the policy, any shape, float32 or
            float64.
        reference_log_probs: the same tokens under the reference, same shape.
        kind: "k1", "k2" or "k3"; the module docstring states value and gradient of each.

    Returns:
        The shape and dtype of the inputs. k3 is never negative, also in floating point: expm1
        rounds to no less than its argument, where exp(-d) - 1 would lose all digits near d = 0.

    Raises:
        ValueError: an unknown kind.

    Source: DeepSeek-R1 (arXiv 2501.12948) eq. 2 for k3.
    """
    difference = log_probs - reference_log_probs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f'unknown KL estimator {kind!r}: allowed are "k1", "k2", "k3"')
