"""Times every registered case against its rivals and prints one row a rival (house law 8).

    python bench/run.py                        # all operators, this machine's CPU
    python bench/run.py --op rans --quick      # one operator, a fraction of the time
    python bench/run.py --device cuda --save   # GPU rows, kept under bench/results/
    python bench/run.py --op packed_linear --only 4096x4096 --only "1 threads" --save   # some cases of one operator
    python bench/run.py --device cuda --op rans --rows FILE   # one line a case in FILE the moment it is measured
    python bench/run.py --op packed_linear --shape 1x4096x11008 --dtype bfloat16 --threads 2    # a shape of your own

``ratio`` is the rival's time over ours, the median of interleaved pairs: above 1 we are faster. ``without_us`` is that
ratio against the rival a good user would write today.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gaugekit
from gaugekit import doctor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import device_rows  # noqa: E402
import host_rows  # noqa: E402
from backends import CudaBackend, one_line  # noqa: E402
from registry import BENCHMARKS, GPU_BENCHMARKS, ONLY, OWN_SHAPES, Own, name_of, wanted  # noqa: E402

CHECKOUT = (HERE.parent / "setup.py").is_file()  # else these files came with an installed wheel
GPU_SECONDS = 0.5  # of measuring a case, after what it compiles
COLUMNS = ["op", "shape", "dtype", "baseline", "median_ms", "baseline_ms", "ratio", "share_of_peak", "label"]
# What tells processors with AVX-512 apart.
INSTRUCTIONS = {"avx512_bf16": "BF16", "amx_bf16": "AMX", "avx512_fp16": "FP16"}


def machine(device: str) -> str:
    """The GPU's name, or the processor's with the instructions torch takes there and its cores.

    Processors of several generations share a name on rented machines; what they multiply with tells them apart.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = doctor.machine()
    instructions = [found["vector"], *(INSTRUCTIONS[f] for f in found["features"] if f in INSTRUCTIONS)]
    return f"{found['name']} ({', '.join(instructions)}), {found['cores']} cores"


def commit() -> str:
    """This checkout's commit, marked when files differ from it; else GAUGEKIT_COMMIT, or the installed version."""
    if os.environ.get("GAUGEKIT_COMMIT"):
        return os.environ["GAUGEKIT_COMMIT"]
    if not CHECKOUT:
        return f"gaugekit {gaugekit.__version__}"
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=HERE, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("-modified" if dirty.stdout.strip() else "")


def load_benchmarks() -> None:
    """Imports every ``ops/bench_*.py`` and ``ops/gpu_*.py`` beside this file; each registers itself."""
    for path in sorted((HERE / "ops").glob("bench_*.py")) + sorted((HERE / "ops").glob("gpu_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def chosen(ops: list[str] | None, device: str, quick: bool, own: Own | None = None):
    """The cases of the named operators (all if None) that ``--case`` leaves, each as its generator comes to it; or
    those of the shapes that ``own`` names, of one operator.
    """
    load_benchmarks()
    if own is not None:
        (op,) = ops
        if op not in OWN_SHAPES:
            raise ValueError(f"--shape: expected --op one of {', '.join(sorted(OWN_SHAPES))}; got {op}")
        asked = [OWN_SHAPES[op].read(op, text, own.dtype) for text in own.shapes]
        threads = own.threads or torch.get_num_threads()
        return (case for numbers, dtype in asked for case in owned(op, numbers, dtype, threads))
    known = GPU_BENCHMARKS if device == "cuda" else BENCHMARKS
    unknown = [op for op in ops or [] if op not in known]
    if unknown:
        raise ValueError(f"op must be one of {', '.join(sorted(known))}; got {', '.join(unknown)}")

    def cases():
        for op in ops or sorted(known):
            yield from (case for case in known[op](device, quick) if wanted(name_of(case)))

    return cases()


def owned(op: str, numbers: list[int], dtype: torch.dtype, threads: int):
    """The cases of a user's own shape; ValueError where none can be made of it here."""
    try:
        yield from OWN_SHAPES[op].make(*numbers, dtype, threads)
    except (RuntimeError, TypeError, MemoryError, ArithmeticError) as error:
        shape = "x".join(map(str, numbers))
        raise ValueError(
            f"--shape: expected one that can be measured here, got {shape}: {one_line(error)}"
        ) from error


class Record:
    """Appends one JSON line a case to a file, on the disk before the next case begins; without a file, nothing."""

    def __init__(self, path: Path | None):
        self.path = path

    def line(self, case, **fields) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"op": case.op, "case": name_of(case), **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def measurer(device: str, quick: bool, budget: float | None, once: bool):
    """A function from a built case to its rows."""
    known: dict = {}
    if device == "cpu":
        return lambda case: host_rows.measure(case, budget or (0.4 if quick else case.seconds), known)
    backend = CudaBackend()

    def on_gpu(case):
        backend.clean()
        if once:
            return device_rows.rehearse(case)
        return device_rows.measure(case, budget or GPU_SECONDS, backend, known)

    return on_gpu


def run(
    ops: list[str] | None, device: str, quick: bool, log=sys.stderr, budget: float | None = None,
    record: Path | None = None, once: bool = False, own: Own | None = None,
) -> tuple[list[dict], int]:  # fmt: skip
    """All rows of the named operators (all if None), or of a user's ``own`` shapes, and how many cases failed.

    A wrong result has no row. With a ``record``, with ``own`` shapes, or on a GPU, no exception of a case stops those
    that follow.
    """
    cases = chosen(ops, device, quick, own)
    lines, rows, failed = Record(record), [], 0
    where = {"machine": machine(device), "commit": commit()}
    passed_by = Exception if record is not None or device == "cuda" or own is not None else AssertionError
    timed = measurer(device, quick, budget, once)
    for planned in cases:
        begin = time.perf_counter()
        try:
            found = timed(planned.build())
        except passed_by as error:
            failed += 1
            wrong = "wrong result, not timed: " if isinstance(error, AssertionError) else "not timed: "
            print(f"{planned.op} {name_of(planned)}: {wrong}{one_line(error)}", file=log)
            lines.line(planned, error=one_line(error), **where)
            continue
        seconds = round(time.perf_counter() - begin, 2)
        if once:
            lines.line(planned, once=found, seconds=seconds, **where)
            continue
        found = [row | where for row in found]
        lines.line(planned, seconds=seconds, rows=found)
        rows += found
    return rows, failed


def save(rows: list[dict], piece: str, device: str, folder: Path = HERE / "results") -> Path:
    """Writes the rows with machine, commit and date to ``results/<piece>-<machine>-<date>.json``.

    Rows of other cases that are there already stay: a piece can be measured part by part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    place = "".join(c if c.isalnum() else "-" for c in machine(device).lower())
    place = "-".join(word for word in place.split("-") if word)
    path = folder / f"{piece}-{place}-{date}.json"
    if path.exists():
        new = {_case(row) for row in rows}
        rows = [row for row in json.loads(path.read_text())["rows"] if _case(row) not in new] + rows
    record = {
        "piece": piece,
        "machine": machine(device),
        "commit": commit(),
        "date": date,
        "torch": torch.__version__,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _case(row: dict) -> tuple:
    return tuple(row.get(key) for key in ("shape", "dtype", "threads", "label", "baseline"))


def table(rows: list[dict]) -> str:
    """The rows as aligned text."""

    def cell(row, column):
        value = row[column]
        if column == "baseline" and row["absent"]:
            return f"{value} (absent)"
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        return str(value)

    lines = [COLUMNS] + [[cell(row, column) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


def add_options(options: argparse.ArgumentParser) -> None:
    """What this program takes, but ``--json``; ``gaugekit bench`` takes the same."""
    options.add_argument("--op", action="append", help="an operator to measure (repeatable); default all")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument(
        "--shape",
        action="append",
        help="with one --op, on a CPU: a shape of your own instead of ours (repeatable); --list says how it is written",
    )
    options.add_argument(
        "--dtype", help="with --shape: such as float32 or bf16; default the operator's first"
    )
    options.add_argument("--threads", type=int, help="with --shape: default as many as torch takes")
    options.add_argument("--quick", action="store_true", help="small shapes and short runs")
    options.add_argument(
        "--only",
        "--case",
        action="append",
        default=[],
        help="only cases with this in shape, dtype or label (repeatable)",
    )
    options.add_argument("--list", action="store_true", help="print the cases, measure nothing")
    options.add_argument(
        "--once", action="store_true", help="on a GPU: each check, and each call once; nothing is timed"
    )
    options.add_argument("--budget", type=float, metavar="SECONDS", help="of measuring, a case")
    options.add_argument(
        "--rows", type=Path, metavar="FILE", help="append one JSON line a case, once it is measured"
    )
    options.add_argument(
        "--commit", help="what the rows say was measured; default GAUGEKIT_COMMIT, else git's"
    )
    options.add_argument("--save", action="store_true", help="keep the rows under bench/results/")


def measure(arguments: argparse.Namespace) -> tuple[int, list[dict], Callable[[], str]]:
    """(exit status, the rows or with ``--list`` the cases, their text) of what the options ask for; ValueError where
    they do not fit this machine or each other."""
    if arguments.commit:
        os.environ["GAUGEKIT_COMMIT"] = arguments.commit
    ONLY[:] = arguments.only
    own = _own(arguments)
    if arguments.list:
        cases = [(c.op, name_of(c)) for c in chosen(arguments.op, arguments.device, arguments.quick, own)]
        return 0, [{"op": op, "case": name} for op, name in cases], lambda: _listing(cases)
    if arguments.save and not CHECKOUT:
        raise ValueError(
            "--save: expected a source checkout, whose bench/results/ keeps rows; use --rows FILE here"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a GPU that torch can see for cuda; there is none here")
    if arguments.once and arguments.device == "cpu":
        raise ValueError("--once: expected with --device cuda, got it with cpu")
    rows, failed = run(
        arguments.op,
        arguments.device,
        arguments.quick,
        budget=arguments.budget,
        record=arguments.rows,
        once=arguments.once,
        own=own,
    )
    if arguments.save:
        for op in sorted({row["op"] for row in rows}):
            path = save([row for row in rows if row["op"] == op], op, arguments.device)
            print(f"kept {path.relative_to(HERE.parent)}", file=sys.stderr)
    kept = "kept them under bench/results/" if arguments.save else "wrote nothing"
    done = f"Measured {len(rows)} rows on {machine(arguments.device)} and {kept}."
    keeps = "--save keeps the rows" if CHECKOUT else "--rows FILE keeps the rows"
    again = "docs/pack.md and its neighbours say what they mean" if arguments.save else keeps
    return (1 if failed else 0), rows, lambda: f"{table(rows)}\n\n{done}\nnext: {again}"


def _own(arguments: argparse.Namespace) -> Own | None:
    """The shapes that the options name, if any; ValueError for options that lack their partner."""
    for name in ("dtype", "threads"):
        if getattr(arguments, name) is not None and not arguments.shape:
            raise ValueError(f"--{name}: expected beside --shape, got it without")
    if not arguments.shape:
        return None
    if len(arguments.op or []) != 1:
        raise ValueError(f"--shape: expected with one --op, got {len(arguments.op or [])} of them")
    if arguments.device != "cpu":
        raise ValueError(f"--shape: expected with --device cpu, got {arguments.device}")
    if arguments.threads is not None and not 1 <= arguments.threads <= (os.cpu_count() or arguments.threads):
        raise ValueError(
            f"--threads: expected 1 to {os.cpu_count()}, the cores of this machine, got {arguments.threads}"
        )
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(arguments.dtype, arguments.dtype)
    return Own(tuple(arguments.shape), dtype, arguments.threads)


def _listing(cases: list[tuple[str, str]]) -> str:
    own = [
        f"{op} --shape {shape.pattern}, such as {shape.example}" for op, shape in sorted(OWN_SHAPES.items())
    ]
    return "\n".join([*map(" ".join, cases), "", "shapes of your own, one operator at a time:", *own])


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n\n")[0])
    add_options(options)
    options.add_argument(
        "--json", action="store_true", help="print the rows as one JSON list and nothing else"
    )
    arguments = options.parse_args(argv)
    try:
        status, rows, text = measure(arguments)
    except ValueError as error:
        options.error(str(error))
    print(json.dumps(rows) if arguments.json else text())
    return status


if __name__ == "__main__":
    sys.exit(main())
