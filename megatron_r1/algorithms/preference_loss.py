"""The loss of preference pairs: Bradley-Terry, P(chosen is preferred) = sigmoid(value of chosen - value of rejected).

DeepSeek-R1 trains its helpful reward model on pairs (arXiv 2501.12948, v2 appendix B.2) without spelling the loss out;
this form is InstructGPT's (arXiv 2203.02155, eq. 1), as everywhere. P pairs.
"""

from __future__ import annotations

import torch
from torch.nn.functional import softplus


def pairwise_loss(values_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log sigmoid(chosen - rejected) of each pair in nats, and its derivative in the two values.

    Returns the derivative as well because the two values of a pair may be computed on different ranks: each rank
    differentiates (derivative x value) summed over the values that are its own.

    Args:
        values_P2: float; chosen, rejected.

    Returns:
        losses [P] and slopes [P, 2], neither with gradient.
    """
    margins_P = (values_P2[:, 0] - values_P2[:, 1]).detach()
    slopes_P = torch.sigmoid(-margins_P)
    return softplus(-margins_P), torch.stack([-slopes_P, slopes_P], dim=1)
