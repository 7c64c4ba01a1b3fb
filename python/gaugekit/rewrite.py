"""The engine that streams a checkpoint through rewrites, and what a rewrite has to say."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CERTIFICATE, INDEX, Checkpoint, Writer
from .models import AttentionView, Compact, Layers, Stored
from .report import Report
from .staging import check_target, free_bytes, sha256

VERSION = 1  # of what config.json says about compact modules
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf"}


class Rewrite(ABC):
    """One change of a checkpoint, layer by layer; reading, writing, resuming and certifying are the engine's.

    ``name`` stands in reports. ``claim`` is what verify may expect: "exact" (the same function up to rounding) or
    "approximate". ``needs_statistics`` names the modules whose input moments ``layer`` is to be given ("q", "k", "v",
    "o", or a path inside a block): the engine then makes a calibration pass first (``gaugekit.statistics``).
    """

    name: str
    claim: str = "exact"
    needs_statistics: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """What distinguishes this instance (JSON values): a half-done conversion is resumed only with the same."""
        return {}

    @abstractmethod
    def plan(self, config: dict) -> dict[str, int]:
        """Stored numbers that will go, by group, with their "total", from ``config.json`` alone."""

    @abstractmethod
    def layer(self, view: AttentionView, statistics: Any = None) -> AttentionView:
        """The mathematics: one layer's attention in float64, rewritten.

        ``statistics`` is {module: Moments} of this layer, where ``needs_statistics`` names any.
        """

    def note(self, view: AttentionView, statistics: Any = None) -> dict[str, Any]:
        """What the certificate is to say of a layer (JSON values); arguments as ``layer`` was given them."""
        return {}

    def form(self, view: AttentionView) -> dict[str, Compact]:
        """How the rewritten parts ("q", "k", "v", "o") are stored when not dense; a part left out stays dense."""
        return {}


def invariance_error(before: AttentionView, after: AttentionView, seed: int) -> float:
    """‖after(x) − before(x)‖ / ‖before(x)‖ in float64, for 32 seeded random normal tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 32, before.q.weight.shape[1], dtype=torch.float64, generator=generator)
    expected = before.attend(x)
    return float((after.attend(x) - expected).norm() / expected.norm().clamp_min(torch.finfo(x.dtype).tiny))


def convert(
    source: str | Path,
    target: str | Path,
    rewrites: Sequence[Rewrite],
    *,
    dense: bool = False,
    dtype: str | torch.dtype | None = None,
    calibration: str | Path | None = None,
    pack: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
    pages: Callable[[dict], dict[str, str]] = lambda certificate: {},
) -> Report:
    """Streams the checkpoint ``source`` through ``rewrites``, in order, into a new directory ``target``.

    Both are Hugging Face directories. All arithmetic is float64, rounded once at the end to the dtype a tensor had, or
    to ``dtype`` (float64, float32, bfloat16, float16). The result is compact (it loads after ``import
    gaugekit.integrations.transformers``), or with ``dense`` in the family's plain layout, which needs no gaugekit.
    ``calibration`` is a text file for rewrites that ask for statistics. ``pack`` packs the result
    (``gaugekit.codec.pack``), for which the disk must hold it twice. Memory: one layer and 1 GB. The work happens in
    ``<target>.partial``; after a kill the same call goes on where it stopped, unless ``resume`` is False.
    ``progress(done_bytes, total_bytes)`` is called as the source is hashed, then rewritten (so the total is twice its
    size). A certificate, ``gaugekit_certificate.json``, is left in ``target``, and the text files that ``pages`` makes
    of it: {name: text} (``gaugekit.rank_page.pages`` draws the spectra of a truncation).

    Returns a Report: parameters_before, parameters_after, bytes_before, bytes_after (weight files), steps [{rewrite,
    claim, removed {group: count, total}, ...arguments}], invariance_error (float64, the largest of any layer), seconds.

    Raises ValueError for a source that is missing, damaged, of an unknown family or already converted, an unknown dtype
    name, a target that is not empty or lies inside the source (or holds it), too little free disk, a missing
    ``calibration``, or numbers that do not fit ``dtype``.
    """
    if pack:
        return _convert_and_pack(
            source,
            Path(target),
            rewrites,
            dense=dense,
            dtype=dtype,
            calibration=calibration,
            resume=resume,
            progress=progress,
            pages=pages,
        )
    start = time.perf_counter()
    checkpoint, target = Checkpoint(source), Path(target)
    job = _Job(checkpoint, list(rewrites), dense, _dtype(dtype))
    check_target(checkpoint.path, target)
    plans = [rewrite.plan(checkpoint.config) for rewrite in job.rewrites]
    copies, left = _copies(checkpoint)
    _check_space(job, target, copies)
    if any(rewrite.needs_statistics for rewrite in job.rewrites) and calibration is None:
        asking = ", ".join(rewrite.name for rewrite in job.rewrites if rewrite.needs_statistics)
        raise ValueError(f"calibration: expected a text file ({asking} asks for statistics), got None")
    if calibration is not None and not Path(calibration).is_file():
        raise ValueError(f"calibration: expected a text file, got {str(calibration)!r}, which is none")

    total_bytes = 2 * checkpoint.size_bytes()
    done_bytes = 0

    def advance(size: int) -> None:
        nonlocal done_bytes
        done_bytes += size
        if progress:
            progress(min(done_bytes, total_bytes), total_bytes)

    sums = checkpoint.sha256(advance)
    steps = [
        {"rewrite": rewrite.name, "claim": rewrite.claim, **rewrite.arguments, "removed": plan}
        for rewrite, plan in zip(job.rewrites, plans, strict=True)
    ]
    identity = {"source": sums, "steps": steps, "dense": dense, "dtype": str(job.dtype), "version": VERSION}
    if calibration is not None:
        identity["calibration"] = sha256(Path(calibration))
    writer = Writer(target, identity, resume=resume)
    try:
        statistics = job.statistics(calibration, writer.scratch)
        for number, unit in enumerate(job.units):
            if number >= writer.done:
                tensors, record = job.run(unit, statistics)
                writer.add(tensors, record)
            advance(sum(checkpoint.bytes(name) for name in unit.names))
        records = writer.records
        fields = {
            "parameters_before": sum(record["before"] for record in records),
            "parameters_after": sum(record["after"] for record in records),
            "bytes_before": checkpoint.size_bytes(),
            "steps": steps,
            "invariance_error": max((r["invariance_error"] for r in records if "layer" in r), default=0.0),
        }
        config = job.config(records)

        def certificate(output: dict[str, str]) -> dict:
            return {
                **fields,
                "layers": [
                    {"layer": r["layer"], "invariance_error": r["invariance_error"], **r["notes"]}
                    for r in records
                    if "layer" in r
                ],
                "dense": dense,
                "dtype": None if job.dtype is None else str(job.dtype).removeprefix("torch."),
                "source_sha256": sums,
                "output_sha256": output,
                "versions": {"gaugekit": _version(), "torch": torch.__version__, "format": VERSION},
            }

        writer.finish(config, certificate, copies, pages)
        advance(total_bytes)  # the files' headers count too
    finally:
        writer.close()
    fields["bytes_after"] = Checkpoint(target).size_bytes()
    fields["seconds"] = time.perf_counter() - start
    return Report("convert", fields, [f"not copied: {name} (other weights)" for name in left])


def _convert_and_pack(source: str | Path, target: Path, rewrites: Sequence[Rewrite], **arguments) -> Report:
    """``convert`` into ``<target>.unpacked``, which is packed into ``target`` and removed."""
    from . import codec

    check_target(Path(source), target)
    plain = target.with_name(target.name + ".unpacked")
    if (plain / CERTIFICATE).is_file():
        shutil.rmtree(plain)  # an earlier call ended while it packed; its report is lost, so it is made again
    report = convert(source, plain, rewrites, **arguments)
    packed = codec.pack(plain, target, resume=False)
    shutil.rmtree(plain)
    report.fields["bytes_after"] = packed["bytes_after"]
    report.fields["steps"] = [
        *report["steps"],
        {"rewrite": "pack", "claim": "exact", "bits_per_weight": packed["bits_per_weight"]},
    ]
    report.fields["seconds"] = report["seconds"] + packed["seconds"]
    return report


@dataclass(frozen=True)
class _Unit:
    """A piece of work whose result is written whole: one layer's attention, or one other tensor."""

    names: list[str]
    layer: int | None = None


class _Job:
    """What to do to each unit of a checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, rewrites: list[Rewrite], dense: bool, dtype: torch.dtype | None
    ):
        if "quantization_config" in checkpoint.config:
            method = checkpoint.config["quantization_config"].get("quant_method")
            raise ValueError(
                f"source: expected plain weights, got a checkpoint stored as {method!r}; use the original"
            )
        self.checkpoint, self.rewrites, self.dense, self.dtype = checkpoint, rewrites, dense, dtype
        self.layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
        self.units = []
        taken = set()
        for layer in range(len(self.layers)):
            shapes = self.layers.family.shapes(checkpoint.config, layer)
            unit = _Unit([self.layers.prefix + name for name in shapes], layer)
            for name in unit.names:
                checkpoint.shape(name)  # named in an error now, not after an hour
            self.units.append(unit)
            taken.update(unit.names)
        rest = sorted(
            (name for name in checkpoint.names() if name not in taken), key=lambda n: (checkpoint.file(n), n)
        )
        self.units[:0] = [_Unit([name]) for name in rest]

    def statistics(self, calibration: str | Path | None, folder: Path) -> list | None:
        """The calibration pass, where a rewrite asks for it; indexed by layer. ``folder`` lets it resume, too."""
        modules = sorted({name for rewrite in self.rewrites for name in rewrite.needs_statistics})
        if not modules:
            return None
        from .statistics import collect

        return collect(self.checkpoint, calibration, modules=modules, work_directory=folder)

    def run(self, unit: _Unit, statistics: list | None) -> tuple[dict[str, Tensor], dict]:
        """The tensors to write for a unit, and its record: numbers stored before and after, the error of a layer."""
        source = {name: self.checkpoint.dtype(name) for name in unit.names}
        before = self._parameters(
            {name: (self.checkpoint.shape(name), dtype) for name, dtype in source.items()}
        )
        record: dict[str, Any] = {"before": before}
        if unit.layer is None:
            tensors = {name: self.checkpoint.read(name) for name in unit.names}
        else:
            stored, record["invariance_error"], record["notes"] = self._attention(unit.layer, statistics)
            tensors = {self.layers.prefix + name: tensor for name, tensor in stored.tensors.items()}
            record |= {"layer": unit.layer, "modules": stored.modules}
        written = {}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                dtype = self.dtype or source.get(name) or next(iter(source.values()))
                tensor = _cast(name, tensor, dtype)
            written[name] = tensor.contiguous()
        record["after"] = self._parameters(
            {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}
        )
        return written, record

    def _attention(self, layer: int, statistics: list | None) -> tuple[Stored, float, dict[str, Any]]:
        before = after = self.layers.attention(layer)
        found, notes = None if statistics is None else statistics[layer], {}
        for rewrite in self.rewrites:
            view, after = after, rewrite.layer(after, found)
            notes |= rewrite.note(view, found)
        compact = {}
        if not self.dense:
            for rewrite in self.rewrites:
                compact |= rewrite.form(after)
        stored = self.layers.family.store(self.checkpoint.config, layer, after, compact)
        return stored, invariance_error(before, after, seed=layer), notes

    def _parameters(self, tensors: dict[str, tuple[Sequence[int], torch.dtype]]) -> int:
        recomputed = self.layers.family.recomputed
        return sum(
            torch.Size(shape).numel()
            for name, (shape, dtype) in tensors.items()
            if dtype.is_floating_point and not recomputed(name)
        )

    def config(self, records: list[dict]) -> dict:
        """config.json of the result."""
        config = dict(self.checkpoint.config)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        modules = {name: spec for record in records for name, spec in record.get("modules", {}).items()}
        if modules:
            config["quantization_config"] = {
                "quant_method": "gaugekit",
                "version": VERSION,
                "modules": modules,
            }
        return config


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype != tensor.dtype and bool((cast.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"dtype: {name} holds numbers too large for {dtype}")
    return cast


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    names = {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    short = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype is None or dtype in names.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in names | short:
        raise ValueError(f"dtype: expected one of {', '.join(names | short)}; got {dtype!r}")
    return (names | short)[dtype]


def _check_space(job: _Job, target: Path, copies: dict[str, Path]) -> None:
    """The result is at most as large as the source in the new dtype; what an earlier run left counts as free."""
    needed = sum(path.stat().st_size for path in copies.values()) + (1 << 20)
    for name in job.checkpoint.names():
        dtype = job.checkpoint.dtype(name)
        ratio = job.dtype.itemsize / dtype.itemsize if job.dtype and dtype.is_floating_point else 1
        needed += int(job.checkpoint.bytes(name) * ratio)
    free = free_bytes(target)
    if free < needed:
        raise ValueError(f"target: expected {needed:,} bytes free in {str(target.parent)!r}, got {free:,}")


def _copies(checkpoint: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """The files to copy as they are, by relative name, and the names of other weights, which are left behind."""
    copies, left = {}, []
    for path in sorted(checkpoint.path.rglob("*")):
        name = path.relative_to(checkpoint.path)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            hidden
            or not path.is_file()
            or str(name) in {"config.json", INDEX, CERTIFICATE, *checkpoint.files}
        ):
            continue
        if path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
            left.append(str(name))
        else:
            copies[str(name)] = path
    return copies, left


def _version() -> str:
    from . import __version__

    return __version__


__all__ = ["VERSION", "Checkpoint", "Rewrite", "convert", "invariance_error"]
