"""Attention without value and output matrices, and the standard one as a case of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.nn.cache import LayerCache, positions_of
from gaugekit.nn.rotary import rotate
from gaugekit.nn.rows import check_positions, check_rows
from gaugekit.nn.single_cache import FEW, attend_inputs, dense_weight
from gaugekit.ops.operands import Integers
from gaugekit.ops.shaped_attention.operator import shaped_attention


class ShapedAttention(nn.Module):
    """y = concat_h[(α_h·I + β_h·softmax(Q_h K_hᵀ/√K) − γ_h·C) x_h], x_h the h-th D/H columns: x [B, T, D] -> [B, T, D].

    W_Q starts at 0 and α = β = γ = 1, so at the start y = x. ``groups`` of heads share keys (not values), ``key_width``
    K is D/H unless given, ``rotary_base`` turns queries and keys by position. ``value`` and ``output`` are modules for
    the two matrices this does without: a network's first layer keeps the former, a standard block has both and
    ``shaped=False``. Without ``query`` or ``key`` the input itself stands in their place: heads (or groups) times K has
    to be D then (``symmetry.absorb`` makes such models). He and Hofmann, Simplifying Transformer Blocks, eq. 5, 12.
    ValueError for sizes that do not fit.

    ``single_cache``, which ``gaugekit.fuse(model, cache="x")`` sets: a LayerCache gets x alone, and keys and values are
    read off that.
    """

    single_cache = False

    def __init__(self, width: int, heads: int, *, groups: int | None = None, key_width: int | None = None,
                 causal: bool = True, window: int | None = None, rotary_base: float | None = None, shaped: bool = True,
                 value: nn.Module | None = None, output: nn.Module | None = None,
                 query: bool = True, key: bool = True, std: float = 0.02,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        groups = heads if groups is None else groups
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups: expected a divisor of heads = {heads}, got {groups}")
        key_width = width // heads if key_width is None else key_width
        if key_width < 1 or (rotary_base is not None and key_width % 2):
            raise ValueError(f"key_width: expected at least 1, and even with rotary_base; got {key_width}")
        if window is not None and window < 1:
            raise ValueError(f"window: expected None or at least 1, got {window}")
        for name, there, inner in (("query", query, heads), ("key", key, groups)):
            if not there and inner * key_width != width:
                raise ValueError(
                    f"{name}: expected True unless {inner} · {key_width} is width = {width}, got False"
                )
        make = {"device": device, "dtype": dtype}
        self.width = width
        self.heads, self.head_width, self.key_width, self.std = heads, width // heads, key_width, std
        self.key_groups = groups
        self.causal, self.window, self.rotary_base, self.shaped = causal, window, rotary_base, shaped
        self.query = nn.Linear(width, heads * key_width, bias=False, **make) if query else nn.Identity()
        self.key = nn.Linear(width, groups * key_width, bias=False, **make) if key else nn.Identity()
        self.value, self.output = value, output
        for name in ("alpha", "beta", "gamma") if shaped else ():
            setattr(self, name, nn.Parameter(torch.empty(heads, **make)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part, std in ((self.key, self.std), (self.query, 0.0 if self.shaped else self.std)):
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=std)
        for gain in (self.alpha, self.beta, self.gamma) if self.shaped else ():
            nn.init.ones_(gain)

    def forward(self, x: Tensor, *, lengths: Integers | None = None, cache: LayerCache | None = None,
                positions: Integers | None = None, cu_seqlens: Integers | None = None) -> Tensor:  # fmt: skip
        """``lengths`` int64 [B]: the rows of x that are real, at the front of each sequence (None: all T).

        With a LayerCache as ``cache`` x follows what that holds; a cache with ``attend`` (q, k, v, window, gains) does
        the attention itself. ``positions`` int64 [T] or [B, T] are for the rotation
        alone, and count on from the cache by default. ``cu_seqlens`` as in ``gaugekit.shaped_attention``.
        """
        lengths = check_rows(x, self.width, lengths)
        positions = check_positions(x, positions, self.rotary_base)
        if cache is not None and not self.causal:
            raise ValueError("cache: expected None without causal, since earlier rows would see later ones")
        if cu_seqlens is not None and (cache is not None or (self.rotary_base and positions is None)):
            raise ValueError("cu_seqlens: expected no cache, and positions beside rotary_base")
        if cache is not None and self.single_cache:
            return self._from_inputs(x, lengths, cache)
        q, (k, v) = self._queries(x), self._keys_values(x)
        if self.rotary_base is not None:
            positions = positions_of(x.shape[1], cache, x.device) if positions is None else positions
            q, k = (rotate(part, positions, self.rotary_base) for part in (q, k))
        gains = self._gains()
        if hasattr(cache, "attend"):
            return self._joined(cache.attend(q, k, v, self.window, gains))
        query_start = None
        if cache is not None:
            k, v, query_start, lengths, mean = cache.append(k, v, lengths, self.shaped and not self.window)
            if mean is not None:  # α·v − γ·mean = (α − γ)·v − γ·(mean − v): C does not read the cache again
                gains = {"alpha": self.alpha - self.gamma, "beta": self.beta, "v0": mean, "lam": -self.gamma}
            if self.window and lengths is None:
                k, v = (part[:, :, -(self.window + x.shape[1] - 1) :] for part in (k, v))
        k = k if k.shape[1] == v.shape[1] else k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
        y = shaped_attention(q, k, v, **gains, causal=self.causal, window=self.window, query_start=query_start,
                             key_lengths=lengths, cu_seqlens=cu_seqlens)  # fmt: skip
        return self._joined(y)

    def _from_inputs(self, x: Tensor, lengths: Integers | None, cache: LayerCache) -> Tensor:
        """As ``forward`` with a cache that holds x."""
        q, step = self._queries(x), cache.append(x[:, None], None, lengths)
        seen = {"window": self.window, "query_start": step.query_start, "key_lengths": step.key_lengths}
        rows = step.keys
        if rows.shape[2] > x.shape[1] and x.shape[1] <= FEW:
            y = attend_inputs(
                q, rows, *self._matrices(x), scale=self.key_width**-0.5, **self._gains(), **seen
            )
        else:
            k, v = self._keys_values(rows[:, 0])
            k = k if k.shape[1] == v.shape[1] else k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
            y = shaped_attention(q, k, v, **self._gains(), causal=True, **seen)
        return self._joined(y)

    def _queries(self, x: Tensor) -> Tensor:
        return self.query(x).unflatten(-1, (-1, self.key_width)).transpose(1, 2)

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.key(x).unflatten(-1, (-1, self.key_width)).transpose(1, 2)
        v = (x if self.value is None else self.value(x)).to(k.dtype)
        return k, v.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _gains(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma} if self.shaped else {}

    def _matrices(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """W_K [G, K, D], and W_V [H, V, D] where there is one; without keys of their own the identity, like x."""
        if isinstance(self.key, nn.Identity):
            keys = torch.eye(self.width, dtype=x.dtype, device=x.device)
        else:
            keys = dense_weight(self.key)
        values = None if self.value is None else dense_weight(self.value).unflatten(0, (self.heads, -1))
        return keys.unflatten(0, (self.key_groups, self.key_width)), values

    def _joined(self, y: Tensor) -> Tensor:
        y = y.transpose(1, 2).flatten(2)
        return y if self.output is None else self.output(y)
