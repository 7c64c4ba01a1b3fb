"""The whole path on a real pretrained model: look, remove, load, pack, prove, run, time; with a report page.

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

from gaugekit import __version__, _library, doctor
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec import pack, unpack
from gaugekit.demo import page, running, speed
from gaugekit.files.durable import lock, sha256, written
from gaugekit.hf import loading
from gaugekit.pages.figures import DTYPES
from gaugekit.pages.numbers import change, over_noise
from gaugekit.progress import bar
from gaugekit.report import Report
from gaugekit.symmetry import GaugeFix
from gaugekit.text.samples import minilm, smollm2
from gaugekit.text.sentences import sentences as documentation
from gaugekit.verbs.convert import convert
from gaugekit.verbs.fuse import fuse
from gaugekit.verbs.inspect import inspect
from gaugekit.verbs.verify import NOISE_FACTOR, verify

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
    "No benchmark score was taken: equal answers were shown, on one kind of text (Python’s own documentation, in "
    "English).",
    "Whether packed weights are faster or slower than plain ones depends on the processor and on how many tokens are "
    "worked on at once: docs/resident.md has the figures. Nothing on this page ran on a GPU.",
    "The compact form of gauge fixing is smaller on disk and not yet faster: when the model is loaded, what was "
    "removed is filled in again and each projection is one ordinary matrix product.",
    "The value-free block of the appendix belongs to models trained that way; no such model was run here, only its "
    "arithmetic was timed.",
    "Speeds come from one short run, with one thread, on one machine that may have had other work; take them as an "
    "order of size.",
]
SMOLLM2 = "SmolLM2-135M"
FOUR_BITS = (
    "SmolLM2’s weights were 4-bit numbers once, so what they pack to says nothing about a model trained in bfloat16: "
    "the ratios of file and memory to go by are those of all-MiniLM-L6-v2."
)


def run(
    directory: str | Path = Path("build/demo"),
    *,
    model: str | Path | None = None,
    language_model: str | Path | None = None,
    sentences: int = 100,
    seconds: float = 4.0,
) -> Report:
    """Runs the demo and writes ``report.json`` and ``report.html`` into ``directory``.

    Returns a Report: ``model``, ``running`` [one entry a model: what ``demo.running`` measures of packed weights in
    memory], ``absent`` (why no language model ran, or None), ``pack`` {fp32, bf16: {bytes_before, bytes_after, ratio,
    bits_per_weight, bit_exact}}, ``bytes``, ``parameters_before``, ``parameters_after``, ``parameters_removed``
    {group: count, total}, ``layers`` (as gk.inspect gives them), ``exponents``, ``loaded``, ``fp32`` and ``bf16`` (as
    gk.verify gives them), ``speed``, ``seconds`` by step, ``machine``, ``limits``.

    ``model``: a Hugging Face directory with one model.safetensors and a tokenizer; the installed all-MiniLM-L6-v2.
    ``language_model``: a directory of a decoder with a tokenizer; without it, SmolLM2 beside the default ``model``
    where its package is installed, and none beside another.
    ``sentences``: how many sentences of Python's documentation verify runs.
    ``seconds``: what each of the speed measurements may take; everything runs on one thread, which a busy machine
    delays least.

    Models it makes stand in ``directory/models``, which an earlier run's output may fill: that goes, and nothing
    else. Raises FileNotFoundError, naming the pip command, where the default model is not installed, and ValueError
    where ``directory`` holds models or a report that no demo wrote, or where another demo is writing.
    """
    directory = Path(directory)
    source = minilm() if model is None else Path(model)
    name = "all-MiniLM-L6-v2" if model is None else source.name
    with _workspace(directory) as models, _one_thread():
        clock, strings = _Clock(), documentation(sentences)
        fields = {"model": name, **_steps(source, models, strings, clock)}
        speaker, absent = _language_model(model is None, language_model, clock)
        fields |= _speeds(name, models / "original-bfloat16", speaker, strings, seconds, clock)
        fields |= {
            "absent": absent,
            "sentences": len(strings),
            "seconds": clock.seconds(),
            "machine": _machine(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "limits": LIMITS,
        }
        pages = {
            "report.json": json.dumps(fields, indent=1, allow_nan=False) + "\n",
            "report.html": page.page(fields),
        }
        for file_name, content in pages.items():
            with written(directory / file_name) as file:
                file.write(content.encode())
    return Report("demo", fields, [f"{directory / name}" for name in ("report.html", "report.json")])


def prepare() -> None:
    """Writes SmolLM2 as safetensors where its package is installed, so that the demo need not wait for it."""
    absent = _language_model(True, None, _Clock())[1]
    if absent:
        print(f"gaugekit: the demo will run without a language model: {absent}")


def _steps(source: Path, models: Path, strings: list[str], clock: _Clock) -> dict:
    """The fields of everything but speed."""
    with clock.step("inspect") as progress:
        seen = inspect(source, text=strings[:16], progress=progress)
        exponents = {**_exponents(source), "entropy_bits": seen["exponent_entropy_bits"]}
    with clock.step("convert") as progress:
        folders = {kind: models / f"gauge-fixed-{dtype}" for kind, dtype in DTYPES.items()}
        converted = convert(source, folders["fp32"], [GaugeFix()], progress=progress)
        convert(source, folders["bf16"], [GaugeFix()], dtype="bfloat16", progress=progress)
        plain = {"fp32": source, "bf16": models / "original-bfloat16"}
        convert(source, plain["bf16"], [], dtype="bfloat16", progress=progress)
    with clock.step("load") as progress:
        loaded = _loaded(source, folders["fp32"], strings[:8], progress)
    with clock.step("pack") as progress:
        packed, sizes = _packed(plain, folders, models, progress)
    proofs = {}
    for kind, dtype in DTYPES.items():
        with clock.step(f"verify {dtype}") as progress:
            options = {"text": strings, "dtype": dtype, "pool": "mean", "batch_size": 32}
            proofs[kind] = verify(source, folders[kind], progress=progress, **options).fields
    return {
        "parameters_before": converted["parameters_before"],
        "parameters_after": converted["parameters_after"],
        "parameters_removed": converted["steps"][0]["removed"],
        "layers": seen["layers"],
        "exponents": exponents,
        "loaded": loaded,
        **proofs,
        "noise_limits": {kind: NOISE_FACTOR[getattr(torch, dtype)] for kind, dtype in DTYPES.items()},
        "pack": packed,
        "bytes": sizes,
    }


def _language_model(default: bool, given: str | Path | None, clock: _Clock) -> tuple[Path | None, str | None]:
    """(directory of the language model or None, why there is none)."""
    if given is not None:
        return Path(given), None
    if not default:
        return None, "none was given beside a model of your own"
    try:
        with clock.step("read SmolLM2"), loading.quiet():
            return smollm2(), None
    except (OSError, ImportError, ValueError) as reason:  # the page says why and goes on without it
        return None, str(reason)


def _speeds(
    name: str, plain: Path, speaker: Path | None, strings: list[str], seconds: float, clock: _Clock
) -> dict:
    """Packed weights in memory beside plain ones, coding beside zstd, a value-free attention beside a standard one."""
    with clock.step("run packed encoder") as progress:
        rows = [running.encoder(name, plain, strings, seconds, progress)]
    if speaker is not None:
        with clock.step("run packed language model") as progress:
            smollm2 = speaker.name.startswith("smollm2")
            title, note = (SMOLLM2, FOUR_BITS) if smollm2 else (speaker.name, "")
            rows.append({**running.language_model(title, speaker, 2 * seconds, progress), "note": note})
    with clock.step("time coding and attention") as progress:
        measured = {
            "coding": speed.coding(plain, seconds, progress),
            "attention": speed.attention(seconds, progress),
        }
    return {"running": rows, "speed": measured}


def holds(report: Report) -> bool:
    """Whether both proofs came out, both files came back bit for bit, and so did every weight packed in memory."""
    return all(report[kind]["ok"] and report["pack"][kind]["bit_exact"] for kind in DTYPES) and all(
        row["bit_exact"] for row in report["running"]
    )


def text(report: Report) -> str:
    """The result as plain text: what it brings, the proof, where the page is."""
    rows = _rows(report)
    exact = "and not a bit was lost" if holds(report) else "and the answers DIFFER"
    file, memory = report["pack"]["bf16"]["ratio"], report["running"][0]["memory_ratio"]
    title = f"{report['model']} in bfloat16: file {change(file)}, memory {change(memory)}, {exact}"
    width = max(len(name) for name, _ in rows)
    table = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    if report["absent"]:
        table.append(f"no language model was run: {report['absent']}")
    return "\n".join([*table, "", *(f"wrote {path}" for path in report.notes)])


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = []
    for kind, dtype in DTYPES.items():
        row = report["pack"][kind]
        rows.append((
            f"file, {dtype}",
            f"{row['bytes_before']:,} to {row['bytes_after']:,} bytes ({change(row['ratio'])}), "
            f"{row['bits_per_weight']:.2f} bits a weight, {'bit-exact' if row['bit_exact'] else 'NOT EXACT'}",
        ))  # fmt: skip
    for row in report["running"]:
        rows.append((
            f"memory, {row['model']}",
            f"{row['bytes_before'] / 1e6:,.1f} to {row['bytes_after'] / 1e6:,.1f} MB "
            f"({change(row['memory_ratio'])}), {'bit-exact' if row['bit_exact'] else 'NOT EXACT'}",
        ))  # fmt: skip
        rows.append((
            f"tokens a second, {row['work']}",
            f"plain {row['plain_tokens_s']:.1f}, packed {row['packed_tokens_s']:.1f} ({row['speed_ratio']:.2f} times)"
            f"",
        ))  # fmt: skip
        if "plain_perplexity" in row:
            rows.append((
                f"perplexity, {row['perplexity_tokens']} tokens",
                f"plain {row['plain_perplexity']:.3f}, packed {row['packed_perplexity']:.3f}",
            ))  # fmt: skip
    removed = report["parameters_removed"]["total"]
    share = removed / report["parameters_before"]
    rows.append(("unobservable parameters removed", f"{removed:,} ({share:.2%}), smaller and not yet faster"))
    for kind, dtype in DTYPES.items():
        rows.append((f"error without them, {dtype}", _proof(report[kind], report["noise_limits"][kind])))
    for name, row in report["speed"]["coding"]["coders"].items():
        rows.append((
            f"pack and unpack, {name}",
            row.get("absent")
            or f"{row['pack_gb_s']:.2f} and {row['unpack_gb_s']:.2f} GB/s, ratio {row['ratio']:.4f}",
        ))  # fmt: skip
    rows.append(("seconds", f"{report['seconds']['total']:.0f}"))
    return rows


def _proof(proof: dict, limit: float) -> str:
    cosine = "" if proof["min_cosine"] is None else f", least cosine {proof['min_cosine']:.7f}"
    verdict = "passes" if proof["ok"] else "FAILS"
    return f"{over_noise(proof)} the format's own noise, limit {limit:g} ×{cosine}: {verdict}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch: two that wait for each other on a busy machine take longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
            earlier = models / name
            if earlier.is_dir() and not earlier.is_symlink():
                shutil.rmtree(earlier)
            else:
                earlier.unlink(missing_ok=True)
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

    # Our own bar is on the screen; this also registers the loader of converted directories.
    with loading.quiet():
        plain, compact = (AutoModel.from_pretrained(path).eval() for path in (source, converted))
    replaced = fuse(plain)
    roads = {"converted, from_pretrained": compact, "original, fused": plain}
    proofs = {}
    for road, model in roads.items():
        proof = verify(source, model, text=strings, dtype="float32", pool="mean", progress=progress)
        proofs[road] = {
            key: proof[key] for key in ("noise", "relative_error", "max_abs_error", "min_cosine", "ok")
        }
    proofs["original, fused"]["replaced"] = replaced.fields
    return proofs


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
        "gaugekit": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }
