"""What is coded: groups of matrices that share a rotation, the matrices between two groups, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Progress = Callable[[int, int], None]
BITS = {torch.float16: 16, torch.bfloat16: 13, torch.int8: 10}  # of a rotation's integers, by what is stored


@dataclass
class Part:
    """One weight of a group, before its rotation.

    name: of the stored tensor; an int8 one has its scales beside it, float32 [rows of the stored tensor], under
        ``name + ".scale"``.
    weight: float32 or float64 [rows, D], or [D] (a bias); rotated it is weight · G, G in O(D).
    dtype: stored as torch.float16, torch.bfloat16 or torch.int8.
    axis: the axis of the stored tensor that is rotated: 1 stores [rows, D], 0 stores [D, rows], the transpose.
    """

    name: str
    weight: torch.Tensor
    dtype: torch.dtype
    axis: int = 1


@dataclass
class Group:
    """The matrices that share one rotation of the residual stream of ``dimension`` D."""

    dimension: int
    parts: list[Part]


@dataclass
class Coupling:
    """A matrix [D_left, D_right] from one group's residual stream to a later one's: G_leftᵀ · weight · G_right."""

    name: str
    left: int
    right: int
    weight: torch.Tensor
    dtype: torch.dtype


@dataclass
class GroupReport:
    """What a group's rotation came to, in bits.

    degrees_of_freedom: angles of the rotation that is hidden, D(D − 1)/2 unless rows are too few.
    nominal_bits: as many as the stored dtype would take for them.
    popped_bits: taken from the stack; corrections_bits and pivots_bits: what was given for it.
    realised_bits: the difference, which is what the payload is smaller by.
    seed_bits: popped where the stack was empty: of no use to anyone.
    weights_bits: the group's tensors on the stack.
    """

    dimension: int
    degrees_of_freedom: int
    nominal_bits: int
    popped_bits: float
    corrections_bits: float
    pivots_bits: float
    seed_bits: int
    weights_bits: float

    @property
    def realised_bits(self) -> float:
        return self.popped_bits - self.corrections_bits - self.pivots_bits

    @property
    def share(self) -> float:
        """Realised of nominal."""
        return self.realised_bits / max(1, self.nominal_bits)


@dataclass
class ModelReport:
    """All groups, and what the payload takes."""

    groups: list[GroupReport] = field(default_factory=list)
    payload_bytes: int = 0
    seed_bits: int = 0

    @property
    def degrees_of_freedom(self) -> int:
        return sum(group.degrees_of_freedom for group in self.groups)

    @property
    def nominal_bits(self) -> int:
        return sum(group.nominal_bits for group in self.groups)

    @property
    def realised_bits(self) -> float:
        """What the rotations made the payload smaller by, without what was popped of the seed."""
        return sum(group.realised_bits for group in self.groups) - self.seed_bits

    @property
    def corrections_bits(self) -> float:
        return sum(group.corrections_bits for group in self.groups)


def check(groups: list[Group], others: dict[str, torch.Tensor], couplings: list[Coupling]) -> None:
    """ValueError where something does not fit."""
    names = list(others)
    for index, group in enumerate(groups):
        if not group.parts or not 1 <= group.dimension < 1 << 16:
            expected = "at least one part and a dimension of 1 to 65,535"
            raise ValueError(
                f"groups[{index}]: expected {expected}, got {len(group.parts)}, {group.dimension}"
            )
        for part in group.parts:
            where = f"groups[{index}], part {part.name!r}"
            _check_weight(where, part.weight, part.dtype)
            if part.weight.dim() not in (1, 2) or part.weight.shape[-1] != group.dimension:
                expected = f"[rows, {group.dimension}] or [{group.dimension}]"
                raise ValueError(f"{where}: expected a weight {expected}, got {list(part.weight.shape)}")
            if part.axis not in (0, 1):
                raise ValueError(f"{where}: expected axis 0 or 1, got {part.axis!r}")
            if part.dtype == torch.int8 and part.weight.dim() == 1:
                raise ValueError(f"{where}: expected two axes for int8, got one")
            names += [part.name] + [scale_name(part.name)] * (part.dtype == torch.int8)
    for c in couplings:
        where = f"coupling {c.name!r}"
        _check_weight(where, c.weight, c.dtype)
        if not 0 <= c.left < c.right < len(groups):
            raise ValueError(f"{where}: expected 0 <= left < right < {len(groups)}, got {c.left}, {c.right}")
        shape = [groups[c.left].dimension, groups[c.right].dimension]
        if list(c.weight.shape) != shape:
            raise ValueError(f"{where}: expected a weight {shape}, got {list(c.weight.shape)}")
        names += [c.name] + [scale_name(c.name)] * (c.dtype == torch.int8)
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"names: expected each tensor once, got more than one {sorted(twice)[0]!r}")


def _check_weight(where: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype not in BITS:
        expected = ", ".join(str(d).removeprefix("torch.") for d in BITS)
        raise ValueError(f"{where}: expected a dtype among {expected}, got {dtype}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{where}: expected a float32 or float64 weight, got {weight.dtype}")
    if not finite(weight):
        raise ValueError(f"{where}: expected finite weights")


def finite(weight: torch.Tensor) -> bool:
    """Whether all numbers are: the least and the largest tell, in one pass and without a mask."""
    return not weight.numel() or bool(torch.isfinite(torch.stack(weight.aminmax())).all())


def permutation_bits(count: int) -> float:
    """log2(count!): what the order of ``count`` neurons or heads could hide, beside the rotations' bits.

    It is not taken. Of a sliced OPT-6.7B, 16,384 neurons and 32 heads a layer, it would be 0.007 % of the weights.
    """
    return math.lgamma(count + 1) / math.log(2)


def scale_name(name: str) -> str:
    return f"{name}.scale"
