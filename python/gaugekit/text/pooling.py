"""One vector for a text: the mean of its tokens' hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def embeddings(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Float64 [B, D] on the CPU: hidden states [B, T, D] averaged over each text's real tokens, scaled to length 1.

    ``mask`` [B, T] is nonzero at real tokens; None means that all are.
    """
    states = states.to("cpu", torch.float64)
    if mask is None:
        mean = states.mean(1)
    else:
        real = mask.to("cpu").bool()[..., None]
        # A product of 0 and NaN is NaN: what stands at padding positions must not get into the mean.
        mean = states.masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
