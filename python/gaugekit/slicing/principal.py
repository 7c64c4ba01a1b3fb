"""The basis of each junction: the directions in which a text moves the residual stream most, one layer in memory.

At junction j the covariance of the stream is summed over the tokens of a text, in float64, and its leading D′
eigenvectors become Q_j. What they leave out is cut from the stream before it goes on, so that each basis is found for
what the sliced model before it will send (Ashkboos et al., SliceGPT, ICLR 2024, section 3.3; the covariance is that of
the stream itself, not of the normalised signal).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gaugekit.calibration.moments import Moments, add
from gaugekit.calibration.streaming import Caught, Pass, Work
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import versions
from gaugekit.files.durable import identity, replacing
from gaugekit.models import Junction, Stream
from gaugekit.text.batches import batches as batches_of
from gaugekit.text.batches import padding

FIRST = "first.pt"


def find(
    checkpoint: Checkpoint,
    sequences: list[list[int]],
    width: int,
    *,
    head: bool,
    work_directory: Path,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Files, one a basis in the order of the model, each {"basis": [D, D′] float64, "kept": the share of the energy}.

    checkpoint: the dense model, of a family whose stream has a view
    sequences: token ids of the text
    width: D′
    head: whether the stream that the head reads gets a basis too
    work_directory: new, empty or this job's own: a killed call is resumed by the same one
    dtype: in which the model runs; sums and eigenvectors are float64
    progress: is told (batches done, batches in all)

    Raises ValueError as ``calibration.collect``; OSError where the disk is too small for two copies of the stream.
    """
    from gaugekit.hf import loading

    run = Pass(checkpoint, dtype, [])
    batches = list(batches_of(sequences, batch_size, padding(loading.config(checkpoint.path))))
    which = identity(
        "slicing",
        versions("transformers"),
        weights={"checkpoint": checkpoint.sha256()},
        text={"tokens": sequences},
        options={"width": width, "head": head, "batch_size": batch_size, "dtype": str(dtype)},
    )
    with contextlib.closing(Work(work_directory, which)) as work:
        return _Bases(run, batches, work, width, head, progress).find()


class _Bases:
    """One call of ``find``."""

    def __init__(self, run: Pass, batches: list, work: Work, width: int, head: bool, progress):
        self.run, self.batches, self.work, self.progress = run, batches, work, progress
        self.stream: Stream = run.family.stream()
        self.width, self.head = width, head
        counts = [len(junctions) for junctions in self.stream.junctions]
        self.total = (1 + sum(counts)) * len(batches)
        self.done = (1 + sum(counts[: work.layer])) * len(batches) if work.embedded else 0

    def find(self) -> list[Path]:
        work, layers = self.work, len(self.stream.junctions)
        if not work.embedded:
            self.run.embed(self.batches, work, self._advance)
            sums = _Sums(self.stream)
            hidden = work.hidden(0, self.batches, self.run.dtype)
            for x, (_, mask) in zip(hidden, self.batches, strict=True):
                sums.add(x[mask.bool()])
            self._save(FIRST, [self._basis(sums)])
            work.record(layer=0)
        for layer in range(work.layer, layers):
            self._save(work.results_path(layer).name, self._layer(layer))
            work.record(layer=layer + 1)
        work.hidden_path(layers).unlink(missing_ok=True)
        return [path for layer in (-1, *range(layers)) for path in self._paths(layer)]

    def _layer(self, layer: int) -> list[dict]:
        """The bases that lie between the junctions of a block, and the one after it."""
        block, junctions = self.run.blocks[layer], self.stream.junctions[layer]
        inside, entries = self._inside(layer, block), []
        self.run.load(block)
        try:
            with contextlib.ExitStack() as hooks:
                entering = torch.load(self._paths(layer - 1)[-1], weights_only=True)["basis"]
                hooks.enter_context(_cutting_inputs(block, entering.to(self.run.dtype)))
                for junction, following in itertools.pairwise(junctions):
                    sums = _Sums(self.stream)
                    with self._reading(inside[following.norm], sums):
                        self.run.through(layer, self.batches, self.work, self._advance, keep=False)
                    entries.append(self._basis(sums))
                    basis = entries[-1]["basis"].to(self.run.dtype)
                    hooks.enter_context(_cutting(junction, inside, basis))
                sums = _Sums(self.stream)
                with self._reading(block, sums):
                    self.run.through(layer, self.batches, self.work, self._advance)
        finally:
            self.run.drop(block)
        if self.head or layer + 1 < len(self.stream.junctions):
            entries.append(self._basis(sums))
        return entries

    def _inside(self, layer: int, block: nn.Module) -> dict[str, nn.Module]:
        """The modules of a block by the names its junctions have for them."""
        root = next(name for name, module in self.run.model.named_modules() if module is block)
        known = dict(block.named_modules())
        junctions = self.stream.junctions[layer]
        names = {name for junction in junctions for name in (junction.norm, *junction.writers)}
        return {name: known[(self.run.prefix[0] + name).removeprefix(f"{root}.")] for name in names}

    def _reading(self, module: nn.Module, sums: _Sums):
        """Sums what enters a norm, which ends the batch, or what leaves a block."""

        def rows(x: Tensor) -> Tensor:
            return x.reshape(*self.run.real.shape, -1)[self.run.real]

        def norm(module, arguments):
            sums.add(rows(arguments[0]))
            raise Caught

        def block(module, arguments, out):
            sums.add(rows(out[0] if isinstance(out, tuple) else out))

        is_block = module in self.run.blocks
        return _hooked(
            module.register_forward_hook(block) if is_block else module.register_forward_pre_hook(norm)
        )

    def _basis(self, sums: _Sums) -> dict:
        if not sums.second.isfinite().all():
            raise ValueError(
                "source: expected a model whose residual stream is finite on the calibration text, "
                "got NaN or infinity in it"
            )
        values, vectors = torch.linalg.eigh(sums.second)
        vectors = vectors.flip(1)[:, : self.width]
        largest = vectors.abs().argmax(0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()  # an eigenvector's sign is anybody's choice
        values = values.flip(0).clamp_min(0)
        kept = values[: self.width].sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return {"basis": vectors.contiguous(), "kept": float(kept)}

    def _save(self, name: str, entries: list[dict]) -> None:
        stem = name.removesuffix(".pt")
        for number, entry in enumerate(entries):
            with replacing(self.work.work / f"{stem}_{number}.pt") as file:
                torch.save(entry, file)
        with replacing(self.work.work / name) as file:
            torch.save(len(entries), file)

    def _paths(self, layer: int) -> list[Path]:
        """The files of the bases that ``layer`` gave; −1 is the embedding."""
        whole = self.work.work / FIRST if layer < 0 else self.work.results_path(layer)
        return [
            whole.with_name(f"{whole.stem}_{number}.pt")
            for number in range(torch.load(whole, weights_only=True))
        ]

    def _advance(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Sums:
    """Σ xᵀx of the stream, float64, the mean of each x taken off where the model's norms do so."""

    def __init__(self, stream: Stream):
        self.centred, self.moments = stream.centred, {}

    def add(self, rows: Tensor) -> None:
        """Counts ``rows`` [N, D]."""
        rows = rows.double()
        add(self.moments, "x", rows - rows.mean(-1, keepdim=True) if self.centred else rows)

    @property
    def second(self) -> Tensor:
        """E xᵀx [D, D]."""
        moments: Moments = self.moments["x"]
        return moments.second


def _cut(x: Tensor, basis: Tensor) -> Tensor:
    """x Q Qᵀ: what a sliced stream can hold of x."""
    return (x @ basis) @ basis.mT


def _cutting_inputs(block: nn.Module, basis: Tensor):
    def hook(module, arguments, named):
        return (_cut(arguments[0], basis), *arguments[1:]), named

    return _hooked(block.register_forward_pre_hook(hook, with_kwargs=True))


@contextlib.contextmanager
def _cutting(junction: Junction, inside: dict[str, nn.Module], basis: Tensor) -> Iterator[None]:
    """Cuts the stream after a junction inside a block, whose own code adds x to what the last writer answers."""
    held: list[Tensor] = []

    def read(module, arguments):
        held[:] = [arguments[0]]

    def write(module, arguments, y):
        if module is not inside[junction.writers[-1]]:
            return _cut(y, basis)
        x = held.pop().reshape(y.shape)
        return _cut(x + y, basis) - x

    handles = [inside[junction.norm].register_forward_pre_hook(read)]
    handles += [inside[writer].register_forward_hook(write) for writer in junction.writers]
    with _hooked(*handles):
        yield


@contextlib.contextmanager
def _hooked(*handles) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
