"""A place in an attention to hang hooks on."""

from __future__ import annotations

from torch import Tensor, nn


class Tap(nn.Module):
    """Does nothing with the values, queries and keys an attention is about to use; forward hooks on it see them.

    u [B, G, T, V], q [B, H, T, K], k [B, G, T, K], as ``gaugekit.nonlocal_energy`` takes them, and the mask.
    """

    def forward(
        self,
        u: Tensor,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool,
        window: int | None = None,
        key_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        return None
