"""Operands, oracle and plain torch for the tests of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from gaugekit.reference.shaped_attention import shaped_attention
from gaugekit.reference.shaped_combine import shaped_combine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels are interpreted
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
GAINS = ("alpha", "beta", "gamma", "lam")
OPEN = {"causal": False, "window": None, "query_start": None, "key_lengths": None, "cu_seqlens": None}


def in_dtypes(cases: dict, narrow: set[str]) -> list[tuple[str, torch.dtype]]:
    """(case, dtype): every pair on a GPU. The interpreter is slow, and a kernel asks for a dtype where it loads, stores
    and multiplies, whatever the mask is: there float32 shows every case and ``narrow`` the other dtypes.
    """
    assert narrow <= cases.keys()
    wide = (torch.float32,)
    return [(name, x) for name in cases for x in DTYPES if DEVICE == "cuda" or name in narrow or x in wide]


@st.composite
def masks(draw, longest: int) -> dict:
    """Batch, queries, keys and mask of a small case: any combination of the mask's arguments but packed sequences."""
    window = draw(st.one_of(st.none(), st.integers(1, longest + 10)))
    mask = {"causal": draw(st.booleans()), "window": window}
    queries, keys, batch = (draw(st.integers(1, most)) for most in (longest, longest, 2))
    if draw(st.booleans()):
        starts = [draw(st.integers(-longest - 5, longest + 5)) for _ in range(batch)]
        mask["query_start"] = torch.tensor(starts)
    if draw(st.booleans()):
        mask["key_lengths"] = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)])
    return {"batch": batch, "queries": queries, "keys": keys, "mask": mask}


@dataclass
class Case:
    """One call: shapes, the gains that are given ("abgl": all), the mask. ``key_width`` 0 leaves the softmax out."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    groups: int = 2
    queries: int = 40
    keys: int = 40
    key_width: int = 0
    width: int = 24
    gains: str = "abgl"
    mask: dict = field(default_factory=dict)

    def __post_init__(self):
        def random(heads, rows, width, shift=0.0):
            return (torch.randn(self.batch, heads, rows, width) + shift).to(self.dtype)

        # Values away from zero: their mean then matters as much as they do.
        self.operands = {"v": random(self.groups, self.keys, self.width, 0.5)}
        if self.key_width:
            self.operands["q"] = random(self.heads, self.queries, self.key_width)
            self.operands["k"] = random(self.groups, self.keys, self.key_width)
        else:
            self.operands["a"] = random(self.heads, self.queries, self.width)
        for name in GAINS:
            self.operands[name] = torch.randn(self.heads) if name[0] in self.gains else None
        self.operands["v0"] = random(self.groups, self.queries, self.width) if "l" in self.gains else None
        self.grad = random(self.heads, self.queries, self.width)
        self.mask = OPEN | self.mask

    def here(self, name: str) -> torch.Tensor | None:
        """The operand on the device of the kernels."""
        x = self.operands[name]
        return None if x is None else x.to(DEVICE)

    def mask_here(self) -> tuple:
        return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in self.mask.values())

    def reference(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Output and gradients of the equation in plain torch, in ``dtype``, on the CPU."""
        given = {name: x for name, x in self.operands.items() if x is not None}
        leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
        out = (shaped_attention if self.key_width else shaped_combine)(**leaves, **self.mask)
        out.backward(self.grad.to(dtype))
        gradients = {
            f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()
        }
        return {"out": out.detach(), **gradients}

    def assert_gain_accurate(
        self, name: str, found: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor
    ) -> None:
        """Law 4 for dα, dβ, dγ, dλ. Such a sum may cancel, so its ulps are those of its terms, added in quadrature:

        one of the dtype, in which A is kept for the backward pass, and few of the float32 of the accumulators.
        """
        alone = {
            gain: torch.zeros(self.heads, dtype=torch.float64)
            for gain in GAINS
            if gain[0] in self.gains + "b"
        }
        alone[name] = torch.ones(self.heads, dtype=torch.float64)
        given = {key: x.double() for key, x in self.operands.items() if x is not None and key not in GAINS}
        terms = (shaped_attention if self.key_width else shaped_combine)(**given, **alone, **self.mask)
        size = (terms * self.grad.double()).square().sum((0, 2, 3)).sqrt().max().item()
        error, plain = ((x.double() - exact).abs().max().item() for x in (found, naive))
        bound = 2 * plain + (torch.finfo(self.dtype).eps + 8 * torch.finfo(torch.float32).eps) * size
        assert error <= bound, f"d{name}: error {error:.3e} exceeds {bound:.3e} (plain torch: {plain:.3e})"


def per_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, ...] summed over the query heads of each group."""
    return x.unflatten(1, (groups, -1)).float().sum(2)
