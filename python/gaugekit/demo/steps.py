"""The whole path on a real pretrained model: look, remove, load, pack, prove, time; with a report page.

``run`` writes report.json and report.html; the page is drawn from the JSON and nothing else.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gaugekit import _library, doctor
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec import pack, unpack
from gaugekit.demo import page, speed
from gaugekit.files.durable import lock, sha256, written
from gaugekit.pages.figures import DTYPES
from gaugekit.progress import bar
from gaugekit.report import Report
from gaugekit.symmetry import GaugeFix
from gaugekit.text.samples import minilm
from gaugekit.text.sentences import sentences as documentation
from gaugekit.verbs.convert import convert
from gaugekit.verbs.fuse import fuse
from gaugekit.verbs.inspect import inspect
from gaugekit.verbs.verify import verify

MARK = ".gaugekit-demo"
WEIGHTS = "model.safetensors"
REPORTS = ("report.json", "report.html")
MADE = [  # all a demo writes into ``models``, also what a kill leaves of it
    place
    for dtype in DTYPES.values()
    for name in (f"gauge-fixed-{dtype}", f"original-{dtype}")
    for place in (name, f"{name}.partial", f"{name}.packed.safetensors", f"{name}.packed.restored")
]
LIMITS = [
    "The compact form is smaller on disk and not yet faster: when the model is loaded, what was removed is filled in "
    "again and each projection is one ordinary matrix product. A kernel that uses the removed part is still to come.",
    "Packing saves storage and transfer. The weights are unpacked before they are used, so a running model needs as "
    "much memory as before.",
    "One model and one kind of text, Python’s own documentation in English. Equal embeddings were shown; no benchmark "
    "score was taken.",
    "The value-free block belongs to models trained that way; no such model was run here, only its arithmetic was "
    "timed.",
    "Speeds come from one short run on one machine that may have had other work; take them as an order of size.",
]


def run(
    directory: str | Path = Path("build/demo"),
    *,
    model: str | Path | None = None,
    sentences: int = 500,
    seconds: float = 8.0,
) -> Report:
    """Runs the demo and writes ``report.json`` and ``report.html`` into ``directory``.

    ``model`` is a Hugging Face directory with one model.safetensors and a tokenizer (default: the installed
    all-MiniLM-L6-v2); ``sentences`` how many sentences of Python's documentation verify runs; ``seconds`` the time
    each of the two speed measurements may take. Fields: ``model``, ``parameters_before``, ``parameters_after``,
    ``parameters_removed`` {group: count, total}, ``layers`` (as gk.inspect gives them), ``exponents``, ``loaded``,
    ``fp32`` and ``bf16`` (as gk.verify gives them), ``pack`` {fp32, bf16: {bytes_before, bytes_after, ratio,
    bits_per_weight, bit_exact}}, ``bytes``, ``speed``, ``seconds`` by step, ``machine``, ``limits``.

    Models it makes stand in ``directory/models``, which an earlier run's output may fill: that goes, and nothing
    else. Raises FileNotFoundError, naming the pip command, where the default model is not installed, and ValueError
    where ``directory`` holds models or a report that no demo wrote, or where another demo is writing.
    """
    directory = Path(directory)
    source = minilm() if model is None else Path(model)
    with _workspace(directory) as models:
        return _run(directory, source, models, model is None, sentences, seconds)


def _run(
    directory: Path, source: Path, models: Path, is_minilm: bool, sentences: int, seconds: float
) -> Report:
    strings = documentation(sentences)
    clock = _Clock()

    with clock.step("inspect") as progress:
        seen = inspect(source, text=strings[:32], progress=progress)
        exponents = {**_exponents(source), "entropy_bits": seen["exponent_entropy_bits"]}
    with clock.step("convert") as progress:
        folders = {kind: models / f"gauge-fixed-{dtype}" for kind, dtype in DTYPES.items()}
        converted = convert(source, folders["fp32"], [GaugeFix()], progress=progress)
        convert(source, folders["bf16"], [GaugeFix()], dtype="bfloat16", progress=progress)
        plain = {"fp32": source, "bf16": models / "original-bfloat16"}
        convert(source, plain["bf16"], [], dtype="bfloat16", progress=progress)
    with clock.step("load") as progress:
        loaded = _loaded(source, folders["fp32"], strings[:32], progress)
    with clock.step("pack") as progress:
        packed, sizes = _packed(plain, folders, models, progress)
    proofs = {}
    with clock.step("verify") as progress:
        for kind, dtype in DTYPES.items():
            proofs[kind] = verify(
                source,
                folders[kind],
                text=strings,
                dtype=dtype,
                pool="mean",
                batch_size=32,
                progress=progress,
            ).fields
    with clock.step("speed") as progress:
        measured = {
            "coding": speed.coding(plain["bf16"], seconds, progress),
            "attention": speed.attention(seconds, progress),
        }

    fields = {
        "model": "all-MiniLM-L6-v2" if is_minilm else source.name,
        "parameters_before": converted["parameters_before"],
        "parameters_after": converted["parameters_after"],
        "parameters_removed": converted["steps"][0]["removed"],
        "sentences": len(strings),
        "layers": seen["layers"],
        "exponents": exponents,
        "loaded": loaded,
        **proofs,
        "pack": packed,
        "bytes": sizes,
        "speed": measured,
        "seconds": clock.seconds(),
        "machine": _machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "limits": LIMITS,
    }
    pages = {
        "report.json": json.dumps(fields, indent=1, allow_nan=False) + "\n",
        "report.html": page.page(fields),
    }
    for name, content in pages.items():
        with written(directory / name) as file:
            file.write(content.encode())
    return Report("demo", fields, [f"{directory / name}" for name in ("report.html", "report.json")])


def holds(report: Report) -> bool:
    """Whether both proofs came out and both files came back bit for bit."""
    return all(report[kind]["ok"] and report["pack"][kind]["bit_exact"] for kind in DTYPES)


def text(report: Report, colour: bool = False) -> str:
    """The result as a table: by rich where ``colour`` is asked for and rich is installed, else as plain text."""
    rows = _rows(report)
    answers = "same answers" if holds(report) else "and the answers DIFFER"
    title = f"{report['model']}: {report['parameters_removed']['total']:,} parameters fewer, {answers}"
    where = "\n".join(["", *report["limits"][:1], "", *(f"wrote {path}" for path in report.notes)])
    if colour:
        try:
            return _rich(title, rows) + where
        except ImportError:
            colour = False
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]) + "\n" + where


def _rows(report: Report) -> list[tuple[str, str]]:
    removed = report["parameters_removed"]
    rows = [(f"removed: {group.replace('_', ' ')}", f"{count:,}") for group, count in removed.items()]
    for kind, dtype in DTYPES.items():
        proof = report[kind]
        rows.append(
            (
                f"error beside noise, {dtype}",
                f"{proof['relative_error']:.2e} beside {proof['noise']:.2e}, min cosine {proof['min_cosine']:.7f}, "
                f"{'passes' if proof['ok'] else 'FAILS'}",
            )
        )
    for kind, dtype in DTYPES.items():
        row = report["pack"][kind]
        rows.append(
            (
                f"packed, {dtype}",
                f"{row['bytes_before']:,} to {row['bytes_after']:,} bytes, ratio {row['ratio']:.4f}, "
                f"{row['bits_per_weight']:.2f} bits a weight, {'bit-exact' if row['bit_exact'] else 'NOT EXACT'}",
            )
        )
    for name, row in report["speed"]["coding"]["coders"].items():
        rows.append(
            (
                f"pack and unpack, {name}",
                row.get("absent")
                or f"{row['pack_gb_s']:.2f} and {row['unpack_gb_s']:.2f} GB/s, ratio {row['ratio']:.4f}",
            )
        )
    block = report["speed"]["attention"]
    rows.append(
        (
            "attention, value-free beside standard",
            f"{block['value_free_ms']:.1f} ms beside {block['standard_ms']:.1f} ms, {block['ratio']:.2f} times as fast",
        )
    )
    rows.append(("seconds", f"{report['seconds']['total']:.0f}"))
    return rows


def _rich(title: str, rows: list[tuple[str, str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console = Console(force_terminal=True, width=shutil.get_terminal_size().columns)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


class _Clock:
    """Seconds by step; each step has one progress bar."""

    def __init__(self):
        self.steps: dict[str, float] = {}

    @contextmanager
    def step(self, name: str):
        begin = time.perf_counter()
        with bar(name) as progress:
            yield progress
        self.steps[name] = time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        return {**self.steps, "total": sum(self.steps.values())}


@contextmanager
def _workspace(directory: Path) -> Iterator[Path]:
    """``directory/models``, marked and locked, without what an earlier demo made there; all else in it stays."""
    models = directory / "models"
    if not (models / MARK).is_file():
        for place in (models, *(directory / name for name in REPORTS)):
            if os.path.lexists(place):
                raise ValueError(
                    f"directory: expected one that the demo may fill, but {place} is not the demo's"
                )
    models.mkdir(parents=True, exist_ok=True)
    with (models / MARK).open("ab") as mark:
        if not lock(mark):
            raise ValueError(f"directory: another demo is writing {str(directory)!r}")
        for name in MADE:
            made = models / name
            shutil.rmtree(made) if made.is_dir() and not made.is_symlink() else made.unlink(missing_ok=True)
        yield models


def _exponents(source: Path) -> dict:
    """How often each exponent occurs among the numbers of all matrices, as bfloat16 stores them.

    ``counts`` starts at 2^``low``. It leaves out zero, which has no magnitude, and at both ends exponents rarer than
    one in a hundred thousand of all ``weights``.
    """
    checkpoint = Checkpoint(source)
    counts = torch.zeros(256, dtype=torch.int64)
    for name in checkpoint.names():
        if checkpoint.dtype(name).is_floating_point and len(checkpoint.shape(name)) > 1:
            bits = checkpoint.read(name).to(torch.bfloat16).contiguous().view(torch.int16)
            counts += torch.bincount((bits.flatten() >> 7 & 0xFF).long(), minlength=256)
    total = counts.sum().item()
    common = (counts[1:] > 1e-5 * total).nonzero().flatten() + 1
    low, high = common[0].item(), common[-1].item()
    return {"weights": total, "low": low - 127, "counts": counts[low : high + 1].tolist()}


def _loaded(source: Path, converted: Path, strings: list[str], progress) -> dict:
    """How far the converted directory, loaded by transformers, and the original, fused, stand from the original."""
    from transformers import AutoModel

    from gaugekit.hf import loading

    with (
        loading.quiet()
    ):  # our own bar is on the screen; this also registers the loader of converted directories
        plain, compact = (AutoModel.from_pretrained(path).eval() for path in (source, converted))
    replaced = fuse(plain)
    roads = {"converted, from_pretrained": compact, "original, fused": plain}
    found = {}
    for road, model in roads.items():
        proof = verify(source, model, text=strings, dtype="float32", pool="mean", progress=progress)
        found[road] = {
            key: proof[key] for key in ("noise", "relative_error", "max_abs_error", "min_cosine", "ok")
        }
    found["original, fused"]["replaced"] = replaced.fields
    return found


def _packed(plain: dict, fixed: dict, models: Path, progress) -> tuple[dict, dict]:
    """Packs the weights of each dtype, as they were and gauge-fixed: (rows of the originals, bytes by variant)."""
    rows, sizes = {}, {}
    for kind, dtype in DTYPES.items():
        original, less = (
            models / f"{name}-{dtype}.packed.safetensors" for name in ("original", "gauge-fixed")
        )
        rows[kind] = _round_trip(plain[kind] / WEIGHTS, original, progress)
        report = pack(fixed[kind] / WEIGHTS, less, progress=progress)
        sizes[kind] = {
            "original": rows[kind]["bytes_before"],
            "gauge-fixed": report["bytes_before"],
            "packed": rows[kind]["bytes_after"],
            "gauge-fixed and packed": report["bytes_after"],
        }
    return rows, sizes


def _round_trip(original: Path, packed: Path, progress) -> dict:
    """What packing the file ``original`` into ``packed`` gives, and whether unpacking brings back every byte."""
    restored = packed.with_suffix(".restored")
    report = pack(original, packed, progress=progress)
    unpack(packed, restored, progress=progress)
    exact = sha256(original) == sha256(restored)
    restored.unlink()
    fields = ("bytes_before", "bytes_after", "ratio", "bits_per_weight")
    return {**{field: report[field] for field in fields}, "bit_exact": exact}


def _machine() -> dict:
    return {
        **doctor.machine(),
        "binary": _library.backends()["cpu"].loaded,
        "gaugekit": importlib.metadata.version("gaugekit"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }
