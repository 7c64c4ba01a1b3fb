"""Attention that pulls its values back to those of the first layer, against over-smoothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.nn.cache import LayerCache, positions_of
from gaugekit.nn.rotary import rotate
from gaugekit.nn.rows import check_positions, check_rows
from gaugekit.nn.tap import Tap
from gaugekit.ops.operands import Gain, Integers, check_tensors
from gaugekit.ops.shaped_attention.operator import shaped_attention


class NeutrenoAttention(nn.Module):
    """y = concat_h[softmax(Q_h K_hᵀ/√K) V_h + λ_h (V⁰_h − V_h)] W_O, V⁰ the first layer's values of the same token.

    x [B, T, D] -> (y [B, T, D], V⁰ [B, G, T, D/H]): called without ``v0`` it is a first layer, plain attention, and
    returns its values for the layers above. ``lam`` is a number or one a head; it is a buffer, or with ``trained`` a
    parameter. ``mix``: V ← V + λ (V⁰ − V) before the attention instead, with one λ a group (value residual learning,
    Zhou et al. 2410.17897; there λ = ½). Source: NeuTRENO (NeurIPS 2023): λ is 0.6 for DeiT, 0.4 for WikiText-103.
    ValueError for sizes that do not fit.
    """

    def __init__(self, width: int, heads: int, *, groups: int | None = None, lam: Gain = 0.6, trained: bool = False,
                 mix: bool = False, causal: bool = True, window: int | None = None, rotary_base: float | None = None,
                 bias: bool = False, std: float = 0.02, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        groups = heads if groups is None else groups
        if heads < 1 or width % heads or groups < 1 or heads % groups:
            raise ValueError(
                f"heads, groups: expected divisors of width {width} and of heads, got {heads}, {groups}"
            )
        make = {"device": device, "dtype": dtype}
        self.heads, self.head_width, self.mix, self.std = heads, width // heads, mix, std
        self.causal, self.window, self.rotary_base = causal, window, rotary_base
        self.query, self.output = (nn.Linear(width, width, bias=bias, **make) for _ in range(2))
        self.key, self.value = (
            nn.Linear(width, groups * self.head_width, bias=bias, **make) for _ in range(2)
        )
        gains = torch.as_tensor(lam, dtype=torch.float32, device=device)
        if gains.dim() > 1 or gains.numel() not in (1, groups if mix else heads):
            raise ValueError(f"lam: expected a number, or [G] with mix, else [H]; got {list(gains.shape)}")
        gains = gains.expand(groups if mix else heads).clone()
        if trained:
            self.lam = nn.Parameter(gains)
        else:
            self.register_buffer("lam", gains)
        self.tap = Tap()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.query, self.key, self.value, self.output):
            nn.init.normal_(part.weight, std=self.std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, v0: Tensor | None = None, *, lengths: Integers | None = None,
                cache: LayerCache | None = None,
                positions: Integers | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``lengths`` int64 [B]: the real rows of x, at the front (None: all T). ``v0`` [B, G, T, D/H], of these rows.

        With a LayerCache as ``cache`` x follows what that holds; V⁰ is needed for the new rows alone and not kept.
        ``positions`` int64 [T] or [B, T] are for the rotation; they count on from the cache by default.
        """
        check_tensors(v0=v0)
        lengths = check_rows(x, self.query.in_features, lengths)
        positions = check_positions(x, positions, self.rotary_base)
        if cache is not None and not self.causal:
            raise ValueError("cache: expected None without causal, since earlier rows would see later ones")
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        if self.rotary_base is not None:
            positions = positions_of(x.shape[1], cache, x.device) if positions is None else positions
            q, k = (rotate(part, positions, self.rotary_base) for part in (q, k))
        first, gains = v if v0 is None else v0, {}
        if v0 is not None and self.mix:
            v = v + self.lam.to(v.dtype)[:, None, None] * (v0 - v)
        elif v0 is not None:
            gains = {"v0": v0, "lam": self.lam}
        mask = {"causal": self.causal, "window": self.window, "key_lengths": lengths}
        if cache is None:
            self.tap(v, q, k, **mask)
        else:
            k, v, mask["query_start"], mask["key_lengths"], _ = cache.append(k, v, lengths, mean=False)
            if self.window and mask["key_lengths"] is None:
                k, v = (part[:, :, -(self.window + x.shape[1] - 1) :] for part in (k, v))
        y = shaped_attention(q, k, v, **gains, **mask)
        return self.output(y.transpose(1, 2).flatten(2)), first
