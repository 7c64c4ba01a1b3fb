"""The basis of a model's residual stream: see ``symmetry.stream``."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gaugekit.models import StreamView
from gaugekit.symmetry.stream import StreamSymmetry, nonzero, without_mean


class StreamRotation(StreamSymmetry):
    """The basis of the stream; elements [D, D] orthogonal, float64.

    Gains of norms stand where they are, so a reader becomes W diag(g) Q diag(1/g): fix ``norm_gains`` first where some
    are small. Channels that a gain of 0 hides turn only among each other: what reads the norm could not take them up.
    Scales of what is added are treated likewise. Where no reader takes up a norm's gain (``StreamView.kept``), it turns
    channels of the same gain alone: there n(u) diag(g) Q = n(u Q) diag(g).
    Fixed: the first D independent rows of what writes to the stream are lower triangular.
    """

    name = "stream_rotation"

    def dimension(self, view: StreamView) -> int:
        if view.head == "none" or view.stranger or view.stream.unturned:
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
        view = view.with_tensors({name: view.tensors[name] @ element for name in view.rows})
        for path, scale in view.writers:
            size = _divisor(view, scale)[:, None]
            weight, bias = view.linear(path)
            turned = None if bias is None else (bias * size[:, 0]) @ element / size[:, 0]
            view = view.with_linear(path, element.mT @ (size * weight) / size, turned)
        for norm, readers in _norms(view):
            gain, shift = nonzero(view.gain(norm)), view.read(f"{norm}.bias")
            for path in readers:
                if path == view.stream.tokens:  # a tied table was turned above
                    continue
                weight, bias = view.linear(path)
                view = view.with_linear(path, (weight * gain) @ element / gain, bias)
            if shift is not None:
                view = view.with_tensors({f"{norm}.bias": (shift / gain) @ element * gain})
        for path in _bare(view):
            weight, bias = view.linear(path)
            view = view.with_linear(path, weight @ element, bias)
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
            raise ValueError(
                f"{self.name}: this model has no such freedom ({view.still or 'no two channels may be turned'})"
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
            elif view.kept:
                why = f"channels whose gains differ in a norm on the stream itself, and between {why}"
            raise ValueError(f"element of {self.name}: expected zeros between {why}")

    @staticmethod
    def _classes(view: StreamView) -> list[Tensor]:
        """The channels that may be turned among each other; ones of a single channel included."""
        size, kept = view.stream.size, [view.gain(norm) for norm in view.kept]
        if any(gain.is_meta for gain in kept):  # gains that are not known agree nowhere
            return [torch.tensor([channel]) for channel in range(size)]
        gains = [view.gain(norm) for norm, _ in view.norms]
        gains += [view.tensors[scale] for _, scale in view.writers if scale is not None]
        # Where only shapes are known, none is 0.
        marks = [(gain == 0).double() for gain in gains if not gain.is_meta]
        marks += [gain.double() for gain in kept]
        if not marks:
            return [torch.arange(size)]
        kinds = torch.stack(marks).unique(dim=1, return_inverse=True)[1]
        return [(kinds == kind).nonzero().flatten() for kind in kinds.unique()]


def _norms(view: StreamView) -> list[tuple[str, tuple[str, ...]]]:
    """As ``StreamView.norms``, with the last norm of a tied head, which the table of embeddings reads beside others."""
    if view.head != "tied":
        return view.norms
    return [*view.norms, (view.stream.norm, (view.stream.tokens, *view.stream.heads))]


def _bare(view: StreamView) -> list[str]:
    """What reads the stream through no norm."""
    return [path for junction in view.junctions if junction.norm is None for path in junction.readers]


def _divisor(view: StreamView, scale: str | None) -> Tensor:
    """The tensor that multiplies what is added, with 1 for 0."""
    if scale is None:
        return torch.ones(view.stream.size, dtype=torch.float64)
    return nonzero(view.tensors[scale])


def _left_alone(view: StreamView) -> list[str]:
    """What no basis changes: the gains of norms, scales, and the biases of what reads the stream."""
    names = [f"{norm}.weight" for norm, _ in _norms(view)]
    names += [f"{norm}.weight" for norm in view.kept]
    names += [scale for _, scale in view.writers if scale is not None]
    names += [f"{path}.bias" for _, readers in _norms(view) for path in readers]
    names += [f"{path}.bias" for path in _bare(view)]
    return [name for name in names if name in view.tensors]


def _rows_of_stream(view: StreamView) -> Tensor:
    """All that is added to the stream or reads it, gains included, as rows [.., D]; and 1ᵀ where means go."""
    rows = [view.tensors[name].reshape(-1, view.stream.size) for name in view.rows]
    for path, scale in view.writers:
        weight, bias = view.linear(path)
        added = weight.mT if bias is None else torch.cat([weight.mT, bias[None]])
        rows.append(added * _divisor(view, scale))
    for norm, readers in _norms(view):
        gain, shift = nonzero(view.gain(norm)), view.read(f"{norm}.bias")
        rows += [view.linear(path)[0] * gain for path in readers]
        rows += [] if shift is None else [(shift / gain)[None]]
    rows += [view.linear(path)[0] for path in _bare(view)]
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
