"""SliceGPT for a checkpoint on disk, its rotations in the cheapest of their exact forms."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gaugekit import report as words
from gaugekit.checkpoint.dtypes import floating
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec import bitsback
from gaugekit.files.durable import dump, replacing, sha256
from gaugekit.files.ranks import Ranks
from gaugekit.files.staging import free_bytes
from gaugekit.hf.sliced import FORMS, Sliced
from gaugekit.models.stream_view import CLASSIFIERS, strangers
from gaugekit.report import Report
from gaugekit.rewrite import Later, engine
from gaugekit.slicing import chain, gauges, page, principal, threshold
from gaugekit.slicing.job import SlicedJob, Slices
from gaugekit.text.batches import windows

AUTO, INT8 = "auto", "int8"
ROTATIONS = (*FORMS, "bits-back", AUTO)


def slice(
    source: str | Path,
    target: str | Path,
    fraction: float = 0.25,
    *,
    calibration: str | Path,
    rotation: str = "auto",
    drop: float | str = 0.0,
    head: bool = False,
    multiple: int = 8,
    windows: int = 64,
    window: int = 256,
    work_directory: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    pack: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
    calibrating: Callable[[int, int], None] | None = None,
    coding: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Writes ``source`` with its residual stream cut to D′ ≈ (1 − fraction)·D into a new directory ``target``.

    At each junction (where a block reads the stream) the leading D′ principal directions of a text become the basis,
    the matrices around it are multiplied into it once, and a small shortcut matrix leads the stream from one basis to
    the next (Ashkboos et al., SliceGPT, ICLR 2024). The function changes: run ``gaugekit.heal`` afterwards, and measure
    what it cost (``gaugekit.perplexity``). LayerNorms become RMSNorms, exactly. Tied embeddings stay one matrix.

    Returns a Report as ``gaugekit.convert`` does; its step "slice" has width, form, forms {form: {numbers, bytes,
    multiply_adds}} of every exact form, and kept, the mean share of the stream's energy.

    source: a Hugging Face directory of a family with a stream view (docs/families.md)
    target: a new or empty directory, which loads after ``import gaugekit.integrations.transformers``
    fraction: the share of D to cut, 0 to less than 1
    calibration: a UTF-8 text file; its first ``windows`` windows of ``window`` tokens are read
    rotation: how shortcuts are stored, each exactly: "dense" as published, "triangular", "polar" (I − Y Yᵀ),
        "bits-back" (dense, in a packed file that hides bits of the model in its rotations; float16 or bfloat16), or
        "auto", the one of fewest bytes. That is never "bits-back", which gives back at most what "triangular" leaves
        out
    drop: of "polar" only, and approximate: columns of Y go whose 1 − σ is below it; "auto" tries thresholds from 0 to
        0.4 and takes the one of least loss on the text's next 8 windows, which nothing was calibrated on
    head: whether the stream before the head is sliced too
    multiple: D′ is rounded to the nearest multiple of it
    work_directory: a new or empty folder for the bases, which take nearly all of the time: they stay there, and another
        call with the same source, text, width and head, in whatever form, reads them
    dtype, pack, resume: as ``gaugekit.convert`` has them
    quantize: "int8", beside "bits-back" alone, and approximate: matrices are stored as integers of 8 bits with a
        scale a row, and read in ``dtype``
    progress: told (bytes done, bytes in all) of the rewriting; ``calibrating`` (batches done, in all) of the
        text, and then of the thresholds' trials; ``coding`` (rotations done, in all) of bits-back
    ranks: as ``gaugekit.convert`` has them; they share the rewriting, while the bases are rank 0's alone

    Raises ValueError for a source of another family, a fraction, rotation or text that does not fit, and as
    ``gaugekit.convert``; OSError where the disk is too small.
    """
    checkpoint = Checkpoint(source)
    _check(fraction, rotation, drop, multiple, quantize)
    for name, count in (("windows", windows), ("window", window)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    if not Path(calibration).is_file():
        raise ValueError(f"calibration: expected a text file, got {str(calibration)!r}, which is none")
    options = {"fraction": fraction, "rotation": rotation, "drop": drop, "head": head, "multiple": multiple,
               "windows": windows, "window": window, "quantize": quantize}  # fmt: skip
    asked = None if dtype is None else floating(dtype)
    work = _Slicing(checkpoint, Path(target), Path(calibration), options, asked)
    packing = engine.Packing() if pack else None
    if rotation == "bits-back":
        if pack:
            raise ValueError(
                "pack: expected False beside rotation='bits-back', whose file is packed; got True"
            )
        packing = engine.Packing("bits-back", functools.partial(work.chain, progress=coding), shared=False)
    depends = {**options, "calibration": sha256(Path(calibration)), "dtype": str(work.dtype)}
    report = engine.run(
        work.job,
        Path(target),
        Later(depends, functools.partial(work.find, work_directory=work_directory, progress=calibrating)),
        calibration=None,
        packing=packing,
        resume=resume,
        progress=progress,
        pages=page.pages,
        ranks=ranks,
    )
    return _told(report, source, target)


def sliced_width(size: int, fraction: float, multiple: int = 8) -> int:
    """D′: (1 − fraction)·D rounded to the nearest multiple, at least one and at most D."""
    nearest = round((1 - fraction) * size / multiple) * multiple
    return min(max(nearest, min(multiple, size)), size)


def _check(fraction: float, rotation: str, drop: float | str, multiple: int, quantize: str | None) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a share from 0 to less than 1, got {fraction!r}")
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: expected one of {', '.join(ROTATIONS)}; got {rotation!r}")
    share = isinstance(drop, int | float) and not isinstance(drop, bool) and 0 <= drop <= 1
    if not share and drop != AUTO:
        raise ValueError(f"drop: expected a number from 0 to 1 or {AUTO!r}, got {drop!r}")
    if drop and rotation != "polar":
        raise ValueError(f"drop: expected beside rotation='polar', got it beside {rotation!r}")
    if quantize not in (None, INT8):
        raise ValueError(f"quantize: expected {INT8!r} or None, got {quantize!r}")
    if quantize and rotation != "bits-back":
        raise ValueError(f"quantize: expected beside rotation='bits-back', got it beside {rotation!r}")
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise ValueError(f"multiple: expected a positive integer, got {multiple!r}")


class _Slicing:
    """One call of ``slice``: from a text to frames."""

    def __init__(
        self, checkpoint, target: Path, text: Path, options: dict[str, Any], dtype: torch.dtype | None
    ):
        self.checkpoint, self.target, self.text = checkpoint, target, text
        self.options = options
        # Bits-back turns the weights once more, and rounds them to the dtype that was asked for only then.
        self.job = SlicedJob(
            checkpoint, False, torch.float32 if options["rotation"] == "bits-back" else dtype
        )
        self.stream = self.job.stream
        table = f"{self.job.layers.prefix}{self.stream.tokens}.weight"
        self.dtype = dtype or checkpoint.dtype(table)
        if options["head"]:
            self._check_head()
        self.width = sliced_width(self.stream.size, options["fraction"], options["multiple"])
        if options["rotation"] == "bits-back" and self.dtype not in chain.DTYPES:
            raise ValueError(
                f"dtype: expected bfloat16 or float16 beside rotation='bits-back', got {self.dtype}"
            )

    def _check_head(self) -> None:
        """ValueError where the end of the stream cannot be cut for its head alone."""
        head, names, layers = f"{self.stream.head}.weight", self.checkpoint.names(), self.job.layers
        if not self.stream.tied and head not in names:
            raise ValueError(
                f"head: expected False for a checkpoint without {head}, which takes up the last norm; got True"
            )
        known = {name for layer in range(layers.family.layers) for name in layers.family.shapes(layer)}
        sizes = {name: self.checkpoint.shape(name) for name in names}
        others = [
            f"{path}.weight" for path in (*self.stream.heads, *CLASSIFIERS) if f"{path}.weight" in names
        ]
        others += strangers([self.stream], known, layers.prefix, sizes)
        if others:
            raise ValueError(
                f"head: expected False beside {others[0]}, which reads the end of the stream as {head} does; got True"
            )

    def find(
        self,
        folder: Path,
        work_directory: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Slices]:
        """The slicing, its frames kept in ``folder``, as its bases are where they have no folder of their own."""
        sequences, held_out = self._sequences()
        self._check_room(sum(map(len, sequences)))
        head = self.options["head"]
        work = folder / "bases" if work_directory is None else Path(work_directory)
        options = {"head": head, "work_directory": work, "progress": progress}
        paths = principal.find(self.checkpoint, sequences, self.width, **options)
        drop, details = self.options["drop"], {}
        if drop == AUTO:
            rows = self._trials(folder, held_out, work, progress)
            drop, details = threshold.best(rows), {"trials": rows}
        entries = [torch.load(path, weights_only=True, mmap=True) for path in paths]
        forms = self._forms()
        form = {"bits-back": "dense"}.get(self.options["rotation"], self.options["rotation"])
        if form == AUTO:
            form = min(forms, key=lambda name: forms[name]["numbers"])
        ranks, frames = self._frames(folder / "frames", [entry["basis"] for entry in entries], form, drop)
        sliced = Sliced(self.width, form, tuple(ranks), head)
        numbers = self._numbers(form, ranks)
        kept = [entry["kept"] for entry in entries]
        details |= {
            "fraction": self.options["fraction"],
            "width": self.width,
            "form": form,
            "drop": drop,
            "kept": sum(kept) / len(kept),
            "forms": forms,
            "permutation_bits": self._permutation_bits(),
            **({"quantize": INT8} if self.options["quantize"] else {}),
        }
        removed = {"total": self.job.stored_numbers() - numbers}
        return [Slices(sliced, frames, removed, kept, details)]

    def chain(self, source: Path, target: Path, progress: Callable[[int, int], None] | None = None) -> Report:
        """Codes the float32 result ``source`` with bits-back, in the dtype that was asked for."""
        layers, head = self.job.layers, self.options["head"]
        return chain.pack(
            self.checkpoint.path,
            source,
            target,
            self.stream,
            layers.prefix,
            head,
            self.dtype,
            self.options["quantize"] == INT8,
            progress,
        )

    def _trials(self, folder: Path, held_out: list[list[int]], work: Path, progress) -> list[dict[str, Any]]:
        """What ``threshold.trials`` found, kept in ``folder``."""
        path, whole = folder / "trials.json", folder / "whole"
        if not path.is_file():
            if not whole.is_dir():  # else one that was stopped after this step
                options = {**self.options, "drop": 0.0, "dtype": self.job.dtype, "work_directory": work}
                slice(self.checkpoint.path, whole, calibration=self.text, **options)
            rows = threshold.trials(whole, held_out, progress)
            with replacing(path) as file:
                file.write(dump({"trials": rows}))
        shutil.rmtree(whole, ignore_errors=True)
        return json.loads(path.read_text(encoding="utf-8"))["trials"]

    def _sequences(self) -> tuple[list[list[int]], list[list[int]]]:
        """The windows to calibrate on, and those after them that a threshold is chosen by, if it is to be."""
        from gaugekit.hf import loading

        tokenizer = loading.tokenizer(self.checkpoint.path)
        if tokenizer is None:
            raise ValueError(f"source: expected a tokenizer in {str(self.checkpoint.path)!r}, found none")
        longest = loading.positions(loading.config(self.checkpoint.path))
        length = min(self.options["window"], longest)
        count = self.options["windows"]
        extra = threshold.HELD_OUT if self.options["drop"] == AUTO else 0
        sequences = windows(tokenizer, self.text, length, count + extra, argument="calibration")
        if extra and len(sequences) < count + extra:
            raise ValueError(
                f"calibration: expected {count + extra} windows of {length} tokens beside drop='auto', which is chosen "
                f"by the last {extra} of them, got {len(sequences)}: give a longer text, fewer windows or a number"
            )
        return sequences[:count], sequences[count:]

    def _check_room(self, tokens: int) -> None:
        """OSError where the bases, the frames and two copies of the stream have no room on the disk."""
        size, places = self.stream.size, self.stream.places
        needed = 2 * (places + 1) * size * self.width * 8 + 2 * tokens * size * 4
        if (free := free_bytes(self.target)) < needed:
            message = f"{needed:,} bytes are needed for the bases of {places} junctions, {free:,} are free"
            raise OSError(errno.ENOSPC, message, str(self.target.parent))

    def _frames(
        self, folder: Path, bases: list[torch.Tensor], form: str, drop: float
    ) -> tuple[list[int], list[Path]]:
        """The ranks of a polar form, and the files of all frames; what is in ``folder`` was made by the same call."""
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "ranks.pt"
        paths = [folder / f"{place}.pt" for place in range(self.stream.places + 1)]
        if not whole.is_file():
            ranks, frame = [], None
            for path, frame in zip(paths, gauges.frames(bases, form, drop=drop), strict=False):
                _save(path, frame)
                ranks += [] if frame.rank is None else [frame.rank]
            if not self.options["head"]:
                _save(paths[-1], gauges.last(frame.basis))
            with replacing(whole) as file:
                torch.save(ranks, file)
        return torch.load(whole, weights_only=True), paths

    def _inner(self) -> int:
        """How many shortcuts lead from one sliced basis to another."""
        return self.stream.places - (0 if self.options["head"] else 1)

    def _numbers(self, form: str, ranks: list[int] | None = None) -> int:
        """The numbers of the sliced model, its shortcuts stored in a form."""
        size, inner = self.stream.size, self._inner()
        each = ranks if ranks else [None] * inner
        shortcuts = sum(gauges.shortcut_numbers(size, self.width, form, rank) for rank in each)
        return self._without_shortcuts + shortcuts

    @functools.cached_property
    def _without_shortcuts(self) -> int:
        return self.job.numbers(Sliced(self.width, "dense", (), self.options["head"]))

    def _forms(self) -> dict[str, dict[str, int]]:
        """What the model would store, and its shortcuts compute for a token, in each exact form."""
        size, forms = self.stream.size, {}
        last = 0 if self.options["head"] else self.width * size
        for form in FORMS:
            numbers = self._numbers(form)
            products = self._inner() * gauges.shortcut_products(size, self.width, form) + last
            stored_bytes = numbers * self.dtype.itemsize
            forms[form] = {"numbers": numbers, "bytes": stored_bytes, "multiply_adds": products}
        return forms

    def _permutation_bits(self) -> float:
        """log₂ of how many orders the neurons of every MLP, and the heads of every attention, could stand in."""
        family, bits = self.job.layers.family, 0.0
        for layer in range(len(self.job.layers)):
            view = family.outline(layer)
            orders = [view.groups, *([view.repeats] * view.groups), self.job.neurons(layer)]
            bits += sum(map(bitsback.permutation_bits, orders))
        return bits


def _save(path: Path, frame: gauges.Frame) -> None:
    with replacing(path) as file:
        torch.save(vars(frame), file)


def _told(report: Report, source: str | Path, target: str | Path) -> Report:
    fields = report.fields
    steps = {step["rewrite"]: step for step in fields["steps"]}
    step, coded = steps["slice"], steps.get("bits-back")
    report.lines = [
        ("width of the stream", f"{step['width']:,}, cut by {100 * step['fraction']:.3g} % and rounded"),
        ("energy kept", f"{100 * step['kept']:.2f} % of the stream's, in the mean over junctions"),
        (
            "form",
            f"{step['form']}, of the forms below"
            if coded is None
            else "bits-back, of the dense form below"
            + (", matrices as int8" if step.get("quantize") else ""),
        ),
        ("parameters", f"{fields['parameters_before']:,} before, {fields['parameters_after']:,} after"),
        (
            "weight files",
            f"{words.size(fields['bytes_before'])} before, {words.size(fields['bytes_after'])} after: "
            f"{words.change(fields['bytes_before'], fields['bytes_after'])}",
        ),
        ("time", f"{fields['seconds']:.1f} s"),
    ]
    if "trials" in step:
        first, taken = (
            next(row for row in step["trials"] if row["drop"] == drop) for drop in (0.0, step["drop"])
        )
        held_out = f"{taken['loss']:.4f} nats a token of held-out text; {first['loss']:.4f} with all of them"
        report.lines.insert(
            3, ("columns dropped", f"those that turn the stream by less than {step['drop']:g}: {held_out}")
        )
    if coded is not None:
        each = coded["realised_bits"] / max(1, coded["degrees_of_freedom"])
        hidden = f"{words.size(coded['realised_bits'] / 8)} hidden in {len(coded['groups'])} rotations"
        report.lines.insert(3, ("given back", f"{hidden}: {each:.2f} bits a degree of freedom"))
    report.tables = {
        "forms of the shortcuts, each the same function": [
            f"{name}: {words.size(form['bytes'])} in all, {form['multiply_adds']:,} multiply-adds a token"
            for name, form in step["forms"].items()
        ]
    }
    report.done = f"Sliced {source} and wrote the result, with its certificate, to {target}."
    report.next = f"gaugekit verify {words.shell(str(source))} {words.shell(str(target))} --perplexity FILE"
    return report
