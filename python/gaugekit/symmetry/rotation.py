"""The basis of a model's residual stream: see ``symmetry.stream``."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gaugekit.models import StreamView
from gaugekit.symmetry.stream import StreamSymmetry, without_mean


class StreamRotation(StreamSymmetry):
    """The basis of the stream; elements [D, D] orthogonal, float64.

    Gains of norms stand where they are, so a reader becomes W diag(g) Q diag(1/g): fix ``norm_gains`` first where some
    are small. Channels that a gain of 0 hides turn only among each other: what reads the norm could not take them up.
    Fixed: the first D independent rows of what writes to the stream are lower triangular.
    """

    name = "stream_rotation"

    def dimension(self, view: StreamView) -> int:
        if view.head == "none":
            return 0
        less = 1 if view.stream.centred else 0
        sizes = [len(channels) - less for channels in self._classes(view)]
        return sum(size * (size - 1) // 2 for size in sizes)

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        size = view.stream.size
        element = torch.eye(size, dtype=torch.float64)
        for channels in self._classes(view):
            normal = torch.randn(len(channels), len(channels), dtype=torch.float64, generator=generator)
            if view.stream.centred:
                basis = without_mean(len(channels))
                kept = torch.ones(len(channels), len(channels), dtype=torch.float64) / len(channels)
                turn = basis.mT @ torch.linalg.qr(basis @ normal @ basis.mT).Q @ basis + kept
            else:
                turn = torch.linalg.qr(normal).Q
            element[channels[:, None], channels] = turn
        return element

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        self._check_rotation(view, element)
        for name in [f"{path}.weight" for path in (view.stream.tokens, view.stream.positions) if path]:
            view = view.with_tensors({name: view.tensors[name] @ element})
        for junction in view.junctions:
            for path in junction.writers:
                weight, bias = view.linear(path)
                view = view.with_linear(path, element.mT @ weight, None if bias is None else bias @ element)
        for norm, readers in _norms(view):
            gain, shift = _divisor(view, norm), view.read(f"{norm}.bias")
            for path in () if readers == (view.stream.tokens,) else readers:  # that table was turned above
                weight, bias = view.linear(path)
                view = view.with_linear(path, (weight * gain) @ element / gain, bias)
            if shift is not None:
                view = view.with_tensors({f"{norm}.bias": (shift / gain) @ element * gain})
        return view

    def fix(self, view: StreamView) -> StreamView:
        if self.dimension(view) == 0:
            return view
        element = torch.eye(view.stream.size, dtype=torch.float64)
        rows = _rows_of_stream(view)
        for channels in self._classes(view):
            part = rows[:, channels]
            basis = without_mean(len(channels)) if view.stream.centred else None
            part = part if basis is None else part @ basis.mT
            turn = _triangular(part)
            if basis is not None:
                ones = torch.ones(len(channels), len(channels), dtype=torch.float64)
                turn = basis.mT @ turn @ basis + ones / len(channels)
            element[channels[:, None], channels] = turn
        return self.act(view, element)

    def contains(self, view: StreamView, other: StreamView) -> bool:
        """As every group's; compared are the products of all rows of the stream, which no basis changes."""
        if self.dimension(view) == 0:  # nothing but the identity
            return super().contains(view, other)
        if view.tensors.keys() != other.tensors.keys():
            return False
        generator = torch.Generator().manual_seed(0)
        if not all(view.tensors[name].equal(other.tensors[name]) for name in _left_alone(view)):
            return False
        mine, theirs = _rows_of_stream(view), _rows_of_stream(other)
        if mine.shape != theirs.shape:
            return False
        probe = torch.randn(len(mine), 8, dtype=torch.float64, generator=generator)
        bound = torch.finfo(torch.float64).eps * len(mine) * mine.norm() * theirs.norm() * probe.norm()
        for channels in self._classes(view):
            parts = [rows[:, channels] for rows in (mine, theirs)]
            products = [rows @ (rows.mT @ probe) for rows in parts]
            if not bool((products[0] - products[1]).abs().max() <= bound):
                return False
        return True

    def _check_rotation(self, view: StreamView, element: Tensor) -> None:
        size = view.stream.size
        if self.dimension(view) == 0:
            why = {
                "none": "its stream is its output",
                "tied": "its head shares the table of embeddings, and no two gains of its last norm agree",
            }
            raise ValueError(
                f"{self.name}: this model has no such freedom ({why.get(view.head, 'no two channels may be turned')})"
            )
        if element.shape != (size, size):
            raise ValueError(
                f"element of {self.name}: expected shape {(size, size)}, got {tuple(element.shape)}"
            )
        eye, ones = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        room = 1e-12 * size
        if (element @ element.mT - eye).abs().max() > room:
            raise ValueError(f"element of {self.name}: expected an orthogonal matrix")
        if view.stream.centred and (ones @ element - ones).abs().max() > room:
            raise ValueError(
                f"element of {self.name}: expected one that leaves 1ᵀ alone, which LayerNorms subtract"
            )
        apart = torch.ones(size, size, dtype=torch.bool)
        for channels in self._classes(view):
            apart[channels[:, None], channels] = False
        if bool((element[apart].abs() > room).any()):
            why = "channels that a norm's gain of 0 hides and the others"
            if view.head == "tied":
                why = (
                    "channels whose gains in the last norm differ, since the head shares the table of embeddings, "
                    f"and between {why}"
                )
            raise ValueError(f"element of {self.name}: expected zeros between {why}")

    @staticmethod
    def _classes(view: StreamView) -> list[Tensor]:
        """The channels that may be turned among each other; ones of a single channel included."""
        size, last = view.stream.size, view.tensors[f"{view.stream.norm}.weight"]
        if last.is_meta and view.head != "own":
            return [torch.tensor([channel]) for channel in range(size)]
        gains = [view.tensors[f"{norm}.weight"] for norm, _ in view.norms]
        marks = [
            (gain == 0).double() for gain in gains if not gain.is_meta
        ]  # where only shapes are known, none is 0
        marks += [last.double()] if view.head != "own" else []
        if not marks:
            return [torch.arange(size)]
        kinds = torch.stack(marks).unique(dim=1, return_inverse=True)[1]
        return [(kinds == kind).nonzero().flatten() for kind in kinds.unique()]


def _norms(view: StreamView) -> list[tuple[str, tuple[str, ...]]]:
    """As ``StreamView.norms``, with the last norm of a tied head, which the table of embeddings reads."""
    if view.head != "tied":
        return view.norms
    return [*view.norms, (view.stream.norm, (view.stream.tokens,))]


def _divisor(view: StreamView, norm: str) -> Tensor:
    """The gain of ``norm``, with 1 for 0: such channels are a class, where the norm's bias is all there is."""
    gain = view.tensors[f"{norm}.weight"]
    return torch.where(gain == 0, 1.0, gain)


def _left_alone(view: StreamView) -> list[str]:
    """What no basis changes: the gains of norms, and the biases of what reads them."""
    names = [f"{norm}.weight" for norm, _ in _norms(view)]
    names += [f"{path}.bias" for _, readers in _norms(view) for path in readers]
    return [name for name in names if name in view.tensors]


def _rows_of_stream(view: StreamView) -> Tensor:
    """All that is added to the stream or reads it, gains included, as rows [.., D]; and 1ᵀ where means go."""
    tables = [f"{path}.weight" for path in (view.stream.tokens, view.stream.positions) if path]
    rows = [view.tensors[name] for name in tables]
    for junction in view.junctions:
        for path in junction.writers:
            weight, bias = view.linear(path)
            rows += [weight.mT] if bias is None else [weight.mT, bias[None]]
    for norm, readers in _norms(view):
        gain, shift = _divisor(view, norm), view.read(f"{norm}.bias")
        rows += [view.linear(path)[0] * gain for path in readers]
        rows += [] if shift is None else [(shift / gain)[None]]
    if view.stream.centred:
        rows.append(torch.ones(1, view.stream.size, dtype=torch.float64))
    return torch.cat(rows)


def _triangular(rows: Tensor) -> Tensor:
    """Q [n, n] orthogonal; the first n independent ``rows`` [.., n] times Q are lower triangular, diagonal > 0."""
    size, basis = rows.shape[1], rows.new_zeros(0, rows.shape[1])
    for row in rows:
        for _ in range(2):  # once is not enough where little is left
            left = row - row @ basis.mT @ basis
            row = left
        if left.norm() > 1e-8 * rows.norm():
            basis = torch.cat([basis, left[None] / left.norm()])
        if len(basis) == size:
            break
    missing = torch.linalg.qr(torch.cat([basis.mT, torch.eye(size, dtype=rows.dtype)], 1)).Q[
        :, len(basis) : size
    ]
    return torch.cat([basis.mT, missing], 1)
