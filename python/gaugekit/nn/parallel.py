"""Modules on several ranks, each of which computes whole heads; where a projection is the identity, a slice of x.

Parameters that are cut are DTensors; everything between them is a plain tensor of this rank. What is not cut, x too, is
the same on all ranks, and so are its gradients.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.identity_linear import IdentityLinear
from gaugekit.nn.low_rank_projection import LowRankProjection
from gaugekit.nn.shaped_attention import ShapedAttention


class Share(ABC):
    """How a kind of module is cut among the ranks of a one-dimensional mesh.

    ``cuts`` {parameter: the dim that is cut}; ``install(module, mesh)``, once those are DTensors, makes the module
    compute this rank's part. ValueError where heads do not come out even.
    """

    cuts: dict[str, int]

    @abstractmethod
    def install(self, module: nn.Module, mesh: Any) -> None:
        """Makes ``module``, whose cut parameters are DTensors on ``mesh``, compute this rank's part."""

    def replaced(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        """Makes ``forward`` the module's, its own parameters being this rank's parts while it runs."""

        @functools.wraps(module.forward)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            with _parts(module):
                return forward(*args, **kwargs)

        module.forward = run


class SharedHeads(Share):
    """A ``ShapedAttention``: its gains by heads, values that are x itself by columns; without an output matrix all
    heads are brought together. Its matrices are cut as any: queries, keys and values by outputs, the output by inputs.
    """

    cuts = {"alpha": 0, "beta": 0, "gamma": 0}  # noqa: RUF012

    def install(self, module: ShapedAttention, mesh: Any) -> None:
        groups = module.key_groups
        even("groups", groups, mesh)
        parts = {"query": module.heads * module.key_width, "key": groups * module.key_width,
                 "value": module.heads * module.head_width}  # fmt: skip
        for name, width in parts.items():
            if getattr(module, name) is None or isinstance(getattr(module, name), nn.Identity):
                setattr(module, name, LocalColumns(width, mesh))
        forward = module.forward
        whole = module.output is not None  # that matrix adds up what the ranks have
        self.replaced(module, forward if whole else lambda *a, **k: joined(forward(*a, **k), mesh))


class SharedIdentity(Share):
    """An ``IdentityLinear``, by outputs: α·x[columns] + β·(x Wᵀ)[columns]."""

    cuts = {"weight": 0}  # noqa: RUF012

    def install(self, module: IdentityLinear, mesh: Any) -> None:
        columns = LocalColumns(module.weight.shape[0], mesh)

        def forward(x: Tensor) -> Tensor:
            alpha, beta = (entering(gain, mesh) for gain in (module.alpha, module.beta))
            return alpha * columns(x) + beta * nn.functional.linear(entering(x, mesh), module.weight)

        self.replaced(module, forward)


class SharedProjection(Share):
    """A ``GaugeProjection``, by heads: what passes through is picked from the whole x on every rank."""

    cuts = {"free": 0, "bias": 0}  # noqa: RUF012

    def install(self, module: GaugeProjection, mesh: Any) -> None:
        heads = even("heads", module.heads, mesh)
        begin = heads * mesh.get_local_rank()
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            rows = module._buffers["rows"]
            module.heads, module._buffers["rows"] = heads, rows[begin : begin + heads]
            try:
                return forward(entering(x, mesh))
            finally:
                module.heads, module._buffers["rows"] = rows.shape[0], rows

        self.replaced(module, run)


class SharedRanks(Share):
    """A ``LowRankProjection``, by heads: as these differ in rank, every rank of the mesh keeps the whole weight, and
    multiplies the rows of its own heads.
    """

    cuts: dict[str, int] = {}  # noqa: RUF012

    def install(self, module: LowRankProjection, mesh: Any) -> None:
        heads = even("heads", len(module.ranks), mesh)
        first = heads * mesh.get_local_rank()
        ranks = module.ranks
        rows = slice(sum(ranks[:first]), sum(ranks[: first + heads]))
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            whole, places = dict(module._parameters), module._buffers["places"]
            parts = {name: y if y is None else entering(y, mesh)[rows] for name, y in whole.items()}
            module._parameters.update(parts)
            module.ranks, module._buffers["places"] = (
                ranks[first : first + heads],
                places[rows] - first * module.width,
            )
            try:
                return forward(entering(x, mesh))
            finally:
                module._parameters.update(whole)
                module.ranks, module._buffers["places"] = ranks, places

        self.replaced(module, run)


SHARES: dict[type[nn.Module], Share] = {
    ShapedAttention: SharedHeads(),
    IdentityLinear: SharedIdentity(),
    GaugeProjection: SharedProjection(),
    LowRankProjection: SharedRanks(),
}


class LocalColumns(nn.Module):
    """This rank's columns of x [..., ``width``]: what the identity is where each rank has its own heads."""

    def __init__(self, width: int, mesh: Any):
        super().__init__()
        part = even("width", width, mesh)
        self.begin, self.end, self.mesh = (
            part * mesh.get_local_rank(),
            part * (mesh.get_local_rank() + 1),
            mesh,
        )

    def forward(self, x: Tensor) -> Tensor:
        return entering(x, self.mesh)[..., self.begin : self.end]

    def extra_repr(self) -> str:
        return f"{self.begin} to {self.end}"


def entering(x: Tensor, mesh: Any) -> Tensor:
    """x, the same on all ranks, of whose gradient each has a part: these are added up."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def joined(y: Tensor, mesh: Any) -> Tensor:
    """The columns of all ranks side by side, on each of them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return (
        DTensor.from_local(y, mesh, [Shard(-1)], run_check=False).redistribute(mesh, [Replicate()]).to_local()
    )


@contextlib.contextmanager
def _parts(module: nn.Module) -> Iterator[None]:
    """The module with this rank's parts for its own parameters."""
    from torch.distributed.tensor import DTensor

    cut = {name: x for name, x in module._parameters.items() if isinstance(x, DTensor)}
    module._parameters.update({name: x.to_local() for name, x in cut.items()})
    try:
        yield
    finally:
        module._parameters.update(cut)


def even(name: str, count: int, mesh: Any) -> int:
    """The share of one rank; ValueError where there is none that is whole."""
    if count % mesh.size():
        raise ValueError(
            f"{name}: expected a multiple of the {mesh.size()} ranks that share them, got {count}"
        )
    return count // mesh.size()
