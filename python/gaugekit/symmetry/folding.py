"""Groups of a whole model that carry numbers from one matrix into the next: see ``symmetry.stream``."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from gaugekit.models import Mlp, StreamView
from gaugekit.models.stream import Exchange, added, centred, folded
from gaugekit.symmetry.stream import StreamSymmetry, factors, nonzero, without_mean

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
            view = self._moved(view, norm, readers, view.gain(norm) * by, by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for norm, readers in view.norms:
            gain = view.gain(norm)
            view = self._moved(view, norm, readers, (gain != 0).to(gain), 1 / nonzero(gain))
        return view

    @staticmethod
    def _moved(view: StreamView, norm: str, readers: tuple[str, ...], gain: Tensor, by: Tensor) -> StreamView:
        shift = view.read(f"{norm}.bias")
        view = view.with_gain(norm, gain, None if shift is None else shift * by)
        for reader in readers:
            weight, bias = view.linear(reader)
            view = view.with_linear(reader, weight / by, bias)
        return view


class LayerScales(StreamSymmetry):
    """What multiplies all that a part adds to the stream, channel by channel. Fixed: 1, and a scale of 0 stays."""

    name = "layer_scales"

    def dimension(self, view: StreamView) -> int:
        return len(self._ways(view)) * view.stream.size

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return factors(self.dimension(view), generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        pieces = self._check(view, element).split(view.stream.size)
        for (path, scale), by in zip(self._ways(view), pieces, strict=True):
            view = self._moved(view, path, scale, view.tensors[scale] * by, by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for path, scale in self._ways(view):
            size = view.tensors[scale]
            view = self._moved(view, path, scale, (size != 0).to(size), 1 / nonzero(size))
        return view

    @staticmethod
    def _moved(view: StreamView, path: str, scale: str, size: Tensor, by: Tensor) -> StreamView:
        weight, bias = view.linear(path)
        view = view.with_linear(path, weight / by[:, None], None if bias is None else bias / by)
        return view.with_tensors({scale: size})

    @staticmethod
    def _ways(view: StreamView) -> list[tuple[str, str]]:
        """(what adds to the stream, the tensor that multiplies it)."""
        return [(path, scale) for path, scale in view.writers if scale is not None]


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
                view = view.with_linear(reader, weight, None if bias is None else added(bias, -weight @ by))
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
            and all(path in view.keys or view.linear(path)[1] is not None for path in readers)
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
                by = -view.tensors[path].mean(-1).flatten()
            elif kind == "reader":
                by = -(view.linear(path)[0] * self._gain(view, path)).mean(-1)
            else:
                weight, bias = view.linear(path)
                scale = self._scale(view, path)[:, None]
                by = -(scale * (weight if bias is None else torch.cat([weight, bias[:, None]], 1))).mean(0)
            view = self._moved(view, kind, path, by)
        return view

    def _moved(self, view: StreamView, kind: str, path: str, by: Tensor) -> StreamView:
        if kind == "table":
            tensor = view.tensors[path]
            return view.with_tensors({path: tensor + by.view(*tensor.shape[:-1], 1)})
        weight, bias = view.linear(path)
        if kind == "writer":
            inputs, moved = weight.shape[1], by / self._scale(view, path)[:, None]
            return view.with_linear(
                path, weight + moved[:, :inputs], None if bias is None else bias + moved[:, inputs]
            )
        gain, shift = self._gain(view, path), view.read(f"{self._norm(view, path)}.bias")
        moved = by[:, None] / gain
        unmoved = shift is None or bias is None
        return view.with_linear(path, weight + moved, bias if unmoved else added(bias, -moved @ shift))

    def _rows(self, view: StreamView) -> list[tuple[str, str, int]]:
        """What has such a mean: ("table", "writer" or "reader", its path, how many)."""
        if not view.stream.centred:
            return []
        tied = [f"{view.stream.tokens}.weight"] if view.head == "tied" else []
        rows = [
            ("table", name, view.tensors[name].numel() // view.stream.size)
            for name in view.rows
            if name not in tied
        ]
        for path, scale in view.writers:
            if scale is not None and _hides(view.tensors[scale]):
                continue  # no multiple of 1ᵀ gets through
            weight, bias = view.linear(path)
            rows.append(("writer", path, weight.shape[1] + (bias is not None)))
        for norm, readers in view.norms:
            if _hides(view.gain(norm)):
                continue  # no row of W times this gain is a multiple of 1ᵀ
            for path in readers:
                weight, bias = view.linear(path)
                if view.read(f"{norm}.bias") is None or bias is not None or path in view.keys:
                    rows.append(("reader", path, weight.shape[0]))
        return rows

    @staticmethod
    def _norm(view: StreamView, reader: str) -> str:
        return next(norm for norm, readers in view.norms if reader in readers)

    def _gain(self, view: StreamView, reader: str) -> Tensor:
        return view.gain(self._norm(view, reader))

    @staticmethod
    def _scale(view: StreamView, writer: str) -> Tensor:
        scale = next(scale for path, scale in view.writers if path == writer)
        return torch.ones(view.stream.size, dtype=torch.float64) if scale is None else view.tensors[scale]


def _hides(gain: Tensor) -> bool:
    """Whether some channel does not get through; where only shapes are known, none is said to."""
    return not gain.is_meta and bool((gain == 0).any())


class StreamOffsets(StreamSymmetry):
    """Constants that go from one term of a sum to another: the tables of embeddings, biases of parts side by side.

    Where norms subtract the mean, constants without one: the rest is among ``stream_means``. Fixed: the first row of
    what gives (position 0, a class token), and all biases but the last, are 0.
    """

    name = "stream_offsets"

    def dimension(self, view: StreamView) -> int:
        return len(view.exchanges) * (view.stream.size - view.stream.centred)

    def random(self, view: StreamView, generator: Generator | None = None) -> Tensor:
        return torch.randn(self.dimension(view), dtype=torch.float64, generator=generator)

    def act(self, view: StreamView, element: Tensor) -> StreamView:
        pairs = view.exchanges
        pieces = self._check(view, element).view(len(pairs), -1) if pairs else self._check(view, element)
        for pair, by in zip(pairs, pieces, strict=True):
            view = self._moved(view, pair, by @ without_mean(view.stream.size) if view.stream.centred else by)
        return view

    def fix(self, view: StreamView) -> StreamView:
        for pair in view.exchanges:
            by = view.tensors[pair.givers[0]].reshape(-1, view.stream.size)[0]
            view = self._moved(view, pair, -(centred(by) if view.stream.centred else by))
        return view

    @staticmethod
    def _moved(view: StreamView, pair: Exchange, by: Tensor) -> StreamView:
        taker = view.tensors[pair.taker].clone()
        rows = taker if taker.dim() == 1 else taker[..., pair.first : pair.end, :]
        rows -= by
        given = {name: view.tensors[name] + by for name in pair.givers}
        return view.with_tensors({**given, pair.taker: taker})


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
