"""Transformer blocks: without value and output matrices (SAS, SAS-P), and the standard Pre-LN one to compare with.

He and Hofmann, Simplifying Transformer Blocks (ICLR 2024), eq. 1, 12 and 13. Every block maps x [B, T, D] to
[B, T, D]; keyword arguments of ``forward`` (lengths, cache, positions, cu_seqlens) go to its ``ShapedAttention``, as do
those of the constructor that ``Block`` does not take: groups, key_width, causal, window, rotary_base.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gaugekit.nn.block import Block
from gaugekit.nn.identity_linear import IdentityLinear


def _first_value(first: bool, width: int, options: dict) -> dict:
    """The value matrix that the paper keeps in the first layer of a network."""
    make = {name: options.get(name) for name in ("device", "dtype")}
    return {"value": IdentityLinear(width, **make)} if first else {}


class SASBlock(Block):
    """a = attention(norm(x)); y = a + β_FF·MLP(norm(a)): no skip around the attention, which starts as the identity.

    ``beta_ff`` should be O(1/√L) for L layers; the paper has 0.1 at L = 18. ``first``: the first layer of a network,
    which keeps a value matrix.
    """

    def __init__(self, width: int, heads: int, *, beta_ff: float = 0.1, first: bool = False, **options: Any):
        options = _first_value(first, width, options) | options
        super().__init__(width, heads, gains={"beta_ff": beta_ff}, **options)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.attention(self.norm(x), **options)
        return x + self.beta_ff * self.mlp(self.mlp_norm(x))


class SASPBlock(Block):
    """x̄ = norm(x); y = β_SA·attention(x̄) + β_FF·MLP(x̄): attention and MLP side by side, no skip at all.

    As ``SASBlock``; it also trains with norm="none". β_SA starts at 1.
    """

    def __init__(self, width: int, heads: int, *, beta_ff: float = 0.1, first: bool = False, **options: Any):
        options = _first_value(first, width, options) | options
        super().__init__(width, heads, gains={"beta_sa": 1.0, "beta_ff": beta_ff}, norms=1, **options)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = self.norm(x)
        return self.beta_sa * self.attention(x, **options) + self.beta_ff * self.mlp(x)


class SkiplessBlock(Block):
    """y = MLP(attention(x)): no skip and, unless ``norm`` says otherwise, no norm.

    Whatever matrix stands at one end of such a block can be carried into its neighbour, exactly (``symmetry.absorb``):
    Graef, Transformer tricks: Removing weights for skipless transformers (arXiv 2404.12362). Deep ones train badly.
    """

    def __init__(self, width: int, heads: int, *, norm: str = "none", first: bool = False, **options: Any):
        options = _first_value(first, width, options) | options
        super().__init__(width, heads, gains={}, norms=1, norm=norm, **options)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.mlp(self.attention(self.norm(x), **options))


class PreLNBlock(Block):
    """a = x + attention(norm(x)); y = a + MLP(norm(a)): softmax attention with value and output matrices."""

    def __init__(self, width: int, heads: int, *, groups: int | None = None, **options: Any):
        make = {name: options.get(name) for name in ("device", "dtype")}
        values = width if groups is None else width // heads * groups
        matrices = {"value": nn.Linear(width, values, bias=False, **make),
                    "output": nn.Linear(width, width, bias=False, **make)}  # fmt: skip
        super().__init__(width, heads, gains={}, groups=groups, **(matrices | {"shaped": False} | options))

    def reset_parameters(self) -> None:
        for matrix in (self.attention.value, self.attention.output):
            if isinstance(matrix, nn.Linear):
                nn.init.normal_(matrix.weight, std=self.attention.std)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.attention(self.norm(x), **options)
        return x + self.mlp(self.mlp_norm(x))
