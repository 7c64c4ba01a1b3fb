"""What slicing a language model costs and saves, in every form of its rotations: perplexity, divergence, bytes.

    python bench/slicing.py                                  # SmolLM2 at 20, 25 and 30 %
    python bench/slicing.py MODEL --fractions 0.25 --heal 200 --save
    python bench/slicing.py MODEL --out-of-domain FILE

Each fraction's bases are found once (nearly all of the time) and taken up by every form. A row is one form in one
dtype, computed in float32. ``perplexity`` is that of 4,096 tokens, ``divergence`` the mean KL a token, of a quarter of
them, from the dense form in float32, which all exact forms are but for rounding: a row of bfloat16 or float16 shows
what storing in that form loses; ``--stored int8`` (a scale a row) shows it of bits-back, and of the dense form's bases.
``numbers`` and ``bytes`` are what a form stores, ``packed_bytes`` its files after exponent coding (bits-back: its own
coding), ``multiply_adds`` those of all shortcuts for one token.

Text: Python's documentation, its first 60,000 characters to measure on, the rest to calibrate and heal with; or
--evaluation and --calibration FILE. ``--out-of-domain FILE`` adds the perplexity on another text.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import gaugekit as gk
from documentation import learnt_and_measured
from gaugekit import samples
from gaugekit.hf import loading
from gaugekit.slicing.gauges import shortcut_products
from gaugekit.verbs.perplexity import compare_perplexity
from run import commit, machine, save

FORMS = ("dense", "triangular", "polar", "bits-back")
STORED = ("bfloat16", "float16", "int8")
MEASURED, CALIBRATED = 4096, 16_384  # tokens
COLUMNS = ("shape", "label", "dtype", "perplexity", "elsewhere", "divergence", "numbers", "bytes", "packed_bytes",
           "multiply_adds", "seconds")  # fmt: skip


@dataclass
class Bench:
    """What is the same for every row of a model."""

    source: Path
    work: Path
    evaluation: Path
    calibration: Path
    elsewhere: Path | None
    drops: list[float]
    forms: list[str]
    stored_dtypes: list[str]

    def __post_init__(self):
        self.positions = loading.positions(loading.config(self.source))
        self.name = self.source.name

    def perplexity(self, model: torch.nn.Module, text: Path) -> float:
        window = min(512, self.positions)
        return gk.perplexity(
            model, text, window=window, most=MEASURED // window, tokenizer=loading.tokenizer(self.source)
        )

    def measured(self, model: torch.nn.Module) -> dict:
        """The perplexities of a model that runs in float32."""
        row = {"perplexity": self.perplexity(model, self.evaluation)}
        if self.elsewhere is not None:
            row["elsewhere"] = self.perplexity(model, self.elsewhere)
        return row

    def divergence(self, dense: torch.nn.Module, model: torch.nn.Module) -> float:
        """Mean KL a token from the dense form in float32, of a quarter of the tokens."""
        window = min(512, self.positions)
        report = compare_perplexity(
            dense, model, self.evaluation, dtype="float32", window=window, most=MEASURED // window // 4
        )
        return report["divergence"]

    def row(self, fraction: float, label: str, dtype: str, **fields) -> dict:
        shape = f"{self.name} {100 * fraction:g} %"
        return {"op": "slicing", "shape": shape, "dtype": dtype, "label": label, **fields}

    def sliced(self, fraction: float, form: str, dtype: str, *, drop: float = 0.0) -> tuple[Path, dict]:
        """The directory of a form, in float32 plain and in a smaller dtype packed, and what its report says."""
        target = self.work / f"{fraction}-{form}-{drop}-{dtype}"
        window = min(256, self.positions)
        integers = dtype == "int8"
        report = gk.slicing.slice(
            self.source,
            target,
            fraction,
            calibration=self.calibration,
            rotation=form,
            drop=drop,
            windows=CALIBRATED // window,
            window=window,
            work_directory=self.work / f"bases-{fraction}",
            dtype="float16" if integers else dtype,
            quantize=dtype if integers else None,
            pack=dtype != "float32" and form != "bits-back",
        )
        return target, report.fields

    def stored(self, target: Path, report: dict, form: str, dtype: str) -> dict:
        """What a form keeps and computes."""
        step, config = report["steps"][0], json.loads((target / "config.json").read_text())
        ranks = config["quantization_config"]["sliced"]["ranks"]
        dense = step["forms"]["dense" if form == "bits-back" else form]
        width, size = step["width"], loading.config(self.source).hidden_size
        products = dense["multiply_adds"]
        if ranks:
            whole = len(ranks) * shortcut_products(size, width, "polar")
            products += sum(shortcut_products(size, width, "polar", rank) for rank in ranks) - whole
        numbers = report["parameters_after"]
        fields = {"width": width, "kept": step["kept"], "numbers": numbers, "multiply_adds": products}
        fields["bytes"] = numbers * getattr(torch, dtype).itemsize
        if dtype != "float32":
            fields["packed_bytes"] = report["bytes_after"]
        return fields if not ranks else fields | {"mean_rank": sum(ranks) / len(ranks)}


def rows_of(bench: Bench, fractions: list[float], heal: int) -> Iterator[dict]:
    """The rows of one model, each as it is measured."""
    begin = time.perf_counter()
    plain = loading.model(bench.source, torch.float32)
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    yield bench.row(0, "plain", "float32", **bench.measured(plain), numbers=numbers, bytes=4 * numbers,
                    seconds=time.perf_counter() - begin)  # fmt: skip
    del plain
    for fraction in fractions:
        yield from _rows_of_fraction(bench, fraction, heal)


def _rows_of_fraction(bench: Bench, fraction: float, heal: int) -> Iterator[dict]:
    dense = None
    cases = [(form, 0.0) for form in bench.forms] + [("polar", drop) for drop in bench.drops if drop]
    for form, drop in cases:
        label = form if not drop else f"{form}, dropped below {drop:g}"
        if form != "bits-back":  # in float32 that is the dense form
            begin = time.perf_counter()
            target, report = bench.sliced(fraction, form, "float32", drop=drop)
            seconds = time.perf_counter() - begin
            model = loading.model(target, torch.float32)
            dense = model if dense is None else dense
            fields = bench.measured(model) | bench.stored(target, report, form, "float32")
            if model is not dense:
                fields["divergence"] = bench.divergence(dense, model)
            yield bench.row(fraction, label, "float32", **fields, seconds=seconds)
        if "int8" in bench.stored_dtypes and form == "dense":
            yield bench.row(fraction, label, "int8", **_rounded(bench, dense))
        for dtype in bench.stored_dtypes:
            if dtype == "int8" and form != "bits-back":
                continue
            begin = time.perf_counter()
            packed, report = bench.sliced(fraction, form, dtype, drop=drop)
            seconds = time.perf_counter() - begin
            model = loading.model(packed, torch.float32)
            fields = bench.stored(packed, report, form, dtype)
            fields["divergence"] = bench.divergence(dense, model)
            yield bench.row(fraction, label, dtype, **fields, seconds=seconds)
        if heal and form == "polar":
            yield _healed(bench, fraction, label, target, heal)


def _rounded(bench: Bench, dense: torch.nn.Module) -> dict:
    """What the dense form loses in int8 without a rotation: every matrix, each row by a scale of its own."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return {"divergence": bench.divergence(dense, model)}


def _healed(bench: Bench, fraction: float, label: str, target: Path, steps: int) -> dict:
    """A sliced model after healing on the calibration text, in pieces of 400 characters."""
    text = bench.calibration.read_text(encoding="utf-8")
    pieces = [text[start : start + 400] for start in range(0, len(text), 400)]
    student, teacher = (loading.model(path, torch.float32) for path in (target, bench.source))
    begin = time.perf_counter()
    report = gk.heal(student, teacher, pieces, steps=steps, batch_size=8)
    seconds = time.perf_counter() - begin
    fields = {
        "divergence_before": report["divergence_before"],
        "divergence_after": report["divergence_after"],
    }
    return bench.row(fraction, f"{label}, healed in {steps} steps", "float32", **bench.measured(student),
                     **fields, trained=report["parameters"], seconds=seconds)  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as aligned text."""

    def cell(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.3e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [COLUMNS] + [tuple(cell(row.get(column)) for column in COLUMNS) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """``folder``, kept, or one that goes."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", type=Path, metavar="MODEL", help="default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.2, 0.25, 0.3])
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="dense is always measured"
    )
    parser.add_argument(
        "--drop", type=float, nargs="+", default=[0.1], help="of polar, columns below it go; 0: no such row"
    )
    parser.add_argument(
        "--stored",
        nargs="*",
        choices=STORED,
        default=["bfloat16", "float16"],
        help="what a form is stored in beside float32",
    )
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS", help="heal the polar forms, too")
    parser.add_argument("--evaluation", type=Path, metavar="FILE")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--out-of-domain", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="bases and sliced models are kept there")
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    forms = [form for form in FORMS if form in options.forms or form == "dense"]
    where, rows = {"machine": machine("cpu"), "commit": commit()}, []
    with workplace(options.work) as work:
        files = {"evaluation": options.evaluation, "calibration": options.calibration}
        for name, text in zip(("calibration", "evaluation"), learnt_and_measured(), strict=True):
            if files[name] is None:
                files[name] = work / f"{name}.txt"
                files[name].write_text(text, encoding="utf-8")
        for source in options.models or [samples.smollm2()]:
            folder = work / source.name
            folder.mkdir(exist_ok=True)
            bench = Bench(
                source,
                folder,
                **files,
                elsewhere=options.out_of_domain,
                drops=options.drop,
                forms=forms,
                stored_dtypes=options.stored,
            )
            for row in rows_of(bench, options.fractions, options.heal):
                rows.append(row | where | {"threads": torch.get_num_threads()})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if options.save:  # at once: the next row may take long
                    save(rows[-1:], f"slicing-{bench.name}", "cpu")
    print(table(rows))


if __name__ == "__main__":
    main()
