"""Groups of a whole model that carry numbers from one matrix into the next: see ``symmetry.stream``."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gaugekit.models import Mlp, StreamView
from gaugekit.models.stream import centred, folded
from gaugekit.symmetry.stream import StreamSymmetry, factors, without_mean

DEGREES = {"relu": 1, "relu2": 2, "linear": 1}  # activations with f(s x) = sᵖ f(x) for s > 0: p


class NormGains(StreamSymmetry):
    """A norm's gain, which may stand in what reads it. Fixed: 1, and a gain of 0 stays."""

    name = "norm_gains"

    def dimension(self, view: StreamView) -> int:
        return len(view.norms) * view.stream.size

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return factors(self.dimension(view), generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        pieces = self._check(view, element).split(view.stream.size)
        for (norm, readers), by in zip(view.norms, pieces, strict=True):
            shift = view.read(f"{norm}.bias")
            moved = {f"{norm}.weight": view.tensors[f"{norm}.weight"] * by}
            view = view.with_tensors(moved if shift is None else moved | {f"{norm}.bias": shift * by})
            for reader in readers:
                weight, bias = view.linear(reader)
                view = view.with_linear(reader, weight / by, bias)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for norm, readers in view.norms:
            gain, shift = view.tensors[f"{norm}.weight"], view.read(f"{norm}.bias")
            by = torch.where(gain == 0, 1.0, gain)
            moved = {f"{norm}.weight": torch.where(gain == 0, 0.0, torch.ones_like(gain))}
            view = view.with_tensors(moved if shift is None else moved | {f"{norm}.bias": shift / by})
            for reader in readers:
                weight, bias = view.linear(reader)
                view = view.with_linear(reader, weight * by, bias)
        return view


class NormBiases(StreamSymmetry):
    """A norm's bias, which may stand in the biases of what reads it. Fixed: 0."""

    name = "norm_biases"

    def dimension(self, view: StreamView) -> int:
        return len(self._norms(view)) * view.stream.size

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return torch.randn(self.dimension(view), dtype=torch.float64, generator=generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        pieces = self._check(view, element).split(view.stream.size)
        for (norm, readers), by in zip(self._norms(view), pieces, strict=True):
            view = view.with_tensors({f"{norm}.bias": view.tensors[f"{norm}.bias"] + by})
            for reader in readers:
                weight, bias = view.linear(reader)
                view = view.with_linear(reader, weight, bias - weight @ by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for norm, readers in self._norms(view):
            shift = view.tensors[f"{norm}.bias"]
            for reader in readers:
                weight, bias = view.linear(reader)
                view = view.with_linear(
                    reader, weight, folded(weight, bias, torch.ones_like(shift), shift)[1]
                )
            view = view.with_tensors({f"{norm}.bias": torch.zeros_like(shift)})
        return view

    @staticmethod
    def _norms(view: StreamView) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (norm, readers)
            for norm, readers in view.norms
            if view.read(f"{norm}.bias") is not None
            and all(view.linear(path)[1] is not None for path in readers)
        ]


class StreamMeans(StreamSymmetry):
    """The mean over the stream's channels, which LayerNorms subtract. Fixed: 0, so that they are RMSNorms.

    (The table of a tied head keeps its means, which logits show.)
    """

    name = "stream_means"

    def dimension(self, view: StreamView) -> int:
        return sum(size for _, _, size in self._rows(view))

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return torch.randn(self.dimension(view), dtype=torch.float64, generator=generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        rows = self._rows(view)
        pieces = self._check(view, element).split([size for _, _, size in rows])
        for (kind, path, _), by in zip(rows, pieces, strict=True):
            view = self._moved(view, kind, path, by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for kind, path, _ in self._rows(view):
            if kind == "table":
                by = -view.tensors[path].mean(-1)
            else:
                weight, bias = view.linear(path)
                if kind == "reader":
                    by = -(weight * self._gain(view, path)).mean(-1)
                else:
                    by = -weight.mean(0) if bias is None else -torch.cat([weight.mean(0), bias.mean()[None]])
            view = self._moved(view, kind, path, by)
        return view

    def _moved(self, view: StreamView, kind: str, path: str, by: Tensor) -> StreamView:
        if kind == "table":
            return view.with_tensors({path: view.tensors[path] + by[:, None]})
        weight, bias = view.linear(path)
        if kind == "writer":
            inputs = weight.shape[1]
            return view.with_linear(path, weight + by[:inputs], None if bias is None else bias + by[inputs:])
        gain, shift = self._gain(view, path), view.read(f"{self._norm(view, path)}.bias")
        moved = by[:, None] / gain
        return view.with_linear(path, weight + moved, bias if shift is None else bias - moved @ shift)

    def _rows(self, view: StreamView) -> list[tuple[str, str, int]]:
        """What has such a mean: ("table", "writer" or "reader", its path, how many)."""
        if not view.stream.centred:
            return []
        rows = [("table", name, view.tensors[name].shape[0]) for name in view.tables]
        for junction in view.junctions:
            for path in junction.writers:
                weight, bias = view.linear(path)
                rows.append(("writer", path, weight.shape[1] + (bias is not None)))
        for norm, readers in view.norms:
            gain = view.tensors[f"{norm}.weight"]
            if not gain.is_meta and bool((gain == 0).any()):
                continue  # no row of W times this gain is a multiple of 1ᵀ
            for path in readers:
                weight, bias = view.linear(path)
                if view.read(f"{norm}.bias") is None or bias is not None:
                    rows.append(("reader", path, weight.shape[0]))
        return rows

    @staticmethod
    def _norm(view: StreamView, reader: str) -> str:
        return next(norm for norm, readers in view.norms if reader in readers)

    def _gain(self, view: StreamView, reader: str) -> Tensor:
        return view.tensors[f"{self._norm(view, reader)}.weight"]


class StreamOffsets(StreamSymmetry):
    """Constants that go from one term of a sum to another: the tables of embeddings, biases of parts side by side.

    Where norms subtract the mean, constants without one: the rest is among ``stream_means``. Fixed: position 0, and all
    biases but the last, are 0.
    """

    name = "stream_offsets"

    def dimension(self, view: StreamView) -> int:
        return len(self._pairs(view)) * (view.stream.size - view.stream.centred)

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return torch.randn(self.dimension(view), dtype=torch.float64, generator=generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        pairs = self._pairs(view)
        pieces = self._check(view, element).view(len(pairs), -1) if pairs else self._check(view, element)
        for pair, by in zip(pairs, pieces, strict=True):
            view = self._moved(view, pair, by @ without_mean(view.stream.size) if view.stream.centred else by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for pair in self._pairs(view):
            first = view.tensors[pair[0]]
            by = first if first.dim() == 1 else first[0]
            view = self._moved(view, pair, -(centred(by) if view.stream.centred else by))
        return view

    @staticmethod
    def _moved(view: StreamView, pair: tuple[str, str], by: Tensor) -> StreamView:
        first, second = pair
        return view.with_tensors({first: view.tensors[first] + by, second: view.tensors[second] - by})

    @staticmethod
    def _pairs(view: StreamView) -> list[tuple[str, str]]:
        """(what loses a constant, what takes it up)."""
        tables = view.tables
        pairs = [(tables[1], tables[0])] if len(tables) == 2 else []
        for junction in view.junctions:
            biases = [f"{path}.bias" for path in junction.writers if view.read(f"{path}.bias") is not None]
            pairs += [(bias, biases[-1]) for bias in biases[:-1]]
        return pairs


class NeuronScales(StreamSymmetry):
    """Scales of an MLP's hidden units, M each. Fixed: a unit's way in, its bias included, has length 1."""

    name = "neuron_scales"

    def dimension(self, view: StreamView) -> int:
        return sum(view.linear(path)[0].shape[0] for path, _, _ in self._ways(view))

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return factors(self.dimension(view), generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        ways = self._ways(view)
        pieces = self._check(view, element).split([view.linear(path)[0].shape[0] for path, _, _ in ways])
        for way, by in zip(ways, pieces, strict=True):
            view = self._moved(view, way, by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for way in self._ways(view):
            weight, bias = view.linear(way[0])
            rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
            length = rows.norm(dim=1)
            if way[0] in {mlp.up for mlp in self._gated(view)}:  # any sign passes there
                length = length * rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0].sign()
            view = self._moved(view, way, torch.where(length == 0, 1.0, 1 / length))
        return view

    @staticmethod
    def _moved(view: StreamView, way: tuple[str, str, int], by: Tensor) -> StreamView:
        path, out, degree = way
        weight, bias = view.linear(path)
        view = view.with_linear(path, weight * by[:, None], None if bias is None else bias * by)
        weight, bias = view.linear(out)
        return view.with_linear(out, weight / by**degree, bias)

    @staticmethod
    def _gated(view: StreamView) -> list[Mlp]:
        return [junction.mlp for junction in view.junctions if junction.mlp and junction.mlp.gate]

    @staticmethod
    def _ways(view: StreamView) -> list[tuple[str, str, int]]:
        """(a way into the hidden units, the way out, the power of a scale that comes out)."""
        ways = []
        for junction in view.junctions:
            if (mlp := junction.mlp) is None:
                continue
            if mlp.gate:
                ways.append((mlp.up, mlp.down, 1))
            if mlp.activation in DEGREES:
                ways.append((mlp.gate or mlp.up, mlp.down, DEGREES[mlp.activation]))
        return ways
