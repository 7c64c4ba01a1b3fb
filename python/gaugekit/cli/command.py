"""The command line: a subcommand for each verb, each a thin call of the function of the same name.

Exit status: 0 done; 1 ``verify`` or ``demo`` found more error than noise allows, or a benchmark gave a wrong result; 2
bad usage, bad input or a result that could not be printed, with one line on stderr; 130 interrupted. With
GAUGEKIT_TRACEBACK=1 in the environment the traceback of an error stands above its line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaugekit.checkpoint.dtypes import NAMES
from gaugekit.cli import streams
from gaugekit.progress import bar
from gaugekit.report import Report

EXTRA_OF = {
    "transformers": "hf",
    "tokenizers": "hf",
    "safetensors": "hf",
    "tqdm": "hf",
    "zstandard": "demo",
    "rich": "demo",
    "zipnn": "bench",
    "triton": "triton",
}
CLOSED = "standard output is closed, so the result cannot be printed"
# verbs whose work stands, in files or in the exit status, also where nothing can be printed
LASTING = {"convert", "heal", "verify", "pack", "unpack", "demo"}
LONGEST = 400  # characters shown of an error that was not foreseen: some libraries write pages
Outcome = tuple[int, Any, Callable[[], str]]  # exit status, what --json prints, what is printed without it


class UsageError(ValueError):
    """Bad usage: the command line was not what the verb takes."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions, so that every error takes the same one-line way out."""

    def error(self, message: str):
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise UsageError(f"{message}; expected: {usage}")

    def print_help(self, file=None):
        if _lost(streams.put(file or sys.stdout, self.format_help().rstrip("\n"))):
            self.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status; ``argv`` defaults to the process's arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv, streams.secure())
    except KeyboardInterrupt:
        streams.put(sys.stderr, "gaugekit: interrupted")
        return 130
    except Exception as error:
        if os.environ.get("GAUGEKIT_TRACEBACK"):
            streams.put(sys.stderr, traceback.format_exc())
        return _refuse(_explained(argv, error))
    finally:
        streams.flush(sys.stderr)


def _run(argv: list[str], printable: bool) -> int:
    arguments = parser().parse_args(argv)
    if not (printable or arguments.lasting):
        raise ValueError(CLOSED)
    # what a library prints while it works must not stand among the results
    with contextlib.redirect_stdout(sys.stderr):
        status, result, text = arguments.run(arguments)
    error = streams.put(sys.stdout, json.dumps(result, allow_nan=False) if arguments.json else text())
    if printable and not _lost(error):
        return status
    reason = f"the result could not be printed: {error}" if printable else CLOSED
    if not arguments.lasting:
        return _refuse(f"gaugekit {argv[0]}: {reason}")
    streams.put(sys.stderr, f"gaugekit {argv[0]}: done, but {reason}")
    return status


def _lost(error: OSError | None) -> bool:
    """Whether what was printed did not arrive, although a reader waits for it (one that has gone, | head, does not)."""
    return error is not None and not isinstance(error, BrokenPipeError)


def _explained(argv: list[str], error: Exception) -> str:
    """The line that stands on stderr for an error: what was expected and what came."""
    if isinstance(error, UsageError):
        return f"gaugekit: {error}; got: {' '.join(['gaugekit', *argv])}"
    verb = f"gaugekit {argv[0]}"
    if isinstance(error, ImportError):
        if extra := EXTRA_OF.get((error.name or "").partition(".")[0]):
            return f"{verb}: needs {error.name}: pip install gaugekit[{extra}]"
        if "pip install" in str(error):
            return f"{verb}: {error}"
    if isinstance(error, ValueError | OSError) and str(error):
        return f"{verb}: {error}"
    if isinstance(error, MemoryError):
        return f"{verb}: the memory of this machine is not enough ({error or 'an allocation failed'})"
    if isinstance(error, RecursionError):
        return f"{verb}: the input is nested more deeply than can be read ({error})"
    shown = textwrap.shorten(str(error), LONGEST, placeholder=" …")
    return f"{verb}: unexpected {type(error).__name__}: {shown} (GAUGEKIT_TRACEBACK=1 shows where)"


def _refuse(message: str) -> int:
    streams.put(sys.stderr, " ".join(message.split()))
    return 2


def parser() -> argparse.ArgumentParser:
    """The parser of ``gaugekit``, with a subparser for each verb."""
    root = Parser(prog="gaugekit", description="Removes from a transformer what nobody can observe.")
    verbs = root.add_subparsers(metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], Outcome], summary: str) -> Parser:
        added = verbs.add_parser(name, help=summary, description=summary)
        added.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
        added.set_defaults(run=run, lasting=name in LASTING)
        return added

    model = "a Hugging Face directory: config.json and safetensors"
    one = verb("inspect", inspect, "count what cannot be observed; ranks, entropies, smoothing by layer")
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("--text", metavar="FILE", help="UTF-8 text: adds the token cosine of each layer")

    one = verb("convert", convert, "write a rewritten copy of a model directory")
    one.add_argument("model", metavar="MODEL", help=model)
    one.add_argument("out", metavar="OUT", help="the directory to write")
    one.add_argument("--gauge", action="store_true", help="remove the parameters that no output depends on")
    one.add_argument(
        "--rows",
        choices=("max_volume", "shared_partition"),
        default="max_volume",
        help="which rows become the identity: the best for each head (default), or one partition for a layer",
    )
    ranks = one.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, metavar="R", help="keep R query/key channels of every head")
    ranks.add_argument("--energy", type=float, metavar="E", help="keep the share E of each head's scores")
    ranks.add_argument(
        "--min-cosine",
        type=float,
        metavar="C",
        help="the smallest ranks that keep the mean cosine C of embeddings on every second sentence of --calibration",
    )
    one.add_argument("--calibration", metavar="FILE", help="UTF-8 text that says which channels matter")
    one.add_argument(
        "--dense", action="store_true", help="keep the plain layout, which loads without gaugekit"
    )
    one.add_argument("--dtype", choices=NAMES, help="store the weights so (default: as the model has them)")
    one.add_argument("--pack", action="store_true", help="pack the result, without loss")

    one = verb("heal", heal, "distil back what an inexact rewrite lost")
    one.add_argument("student", metavar="STUDENT", help="the rewritten model")
    one.add_argument("teacher", metavar="TEACHER", help="the original")
    one.add_argument("out", metavar="OUT", help="the directory to write")
    one.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text to learn from, no labels")
    one.add_argument(
        "--steps", type=int, default=400, help="end to end, after a quarter as many by layer (400)"
    )
    one.add_argument("--batch-size", type=int, default=16, help="sentences a step (16)")
    one.add_argument("--learning-rate", type=float, default=1e-3, help="at its highest (1e-3)")
    one.add_argument(
        "--parameters",
        metavar="PATTERN",
        action="append",
        help="what to train, repeatable (queries and keys)",
    )

    one = verb("verify", verify, "compare two models beside the noise of their dtype; exit status 0 or 1")
    one.add_argument("a", metavar="A", help="the original")
    one.add_argument("b", metavar="B", help="the result")
    one.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to read (default: 500 sentences of Python's documentation)"
    )
    one.add_argument("--dtype", choices=NAMES, help="run both so (default: as A is stored)")
    one.add_argument("--pool", choices=("mean",), help="compare mean-pooled, normalised sentence embeddings")

    for name, run, summary in (
        ("pack", pack, "compress safetensors losslessly into a valid .safetensors file"),
        ("unpack", unpack, "restore packed files byte for byte"),
    ):
        one = verb(name, run, summary)
        one.add_argument("source", metavar="IN", help="a .safetensors file, or a directory that holds some")
        one.add_argument("target", metavar="OUT", help="the file or directory to write")
        memory = "buffers to work in, 64MiB or more, as 500MB or 2GiB (default: 256MiB)"
        one.add_argument("--memory", type=_bytes, default=256 << 20, metavar="SIZE", help=memory)
        if run is pack:
            one.add_argument(
                "--verify", action="store_true", help="decode again and compare before it is published"
            )
            what = "of bfloat16: 0 exponent (default), 1 high byte, 2 exponent and two mantissa bits (smaller, slower)"
            one.add_argument("--model", type=int, choices=(0, 1, 2), help=what)

    one = verb("bench", bench, "time every operator beside its rivals (needs a source checkout)")
    one.add_argument("--op", action="append", help="an operator to time, repeatable (default: all)")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    one.add_argument("--quick", action="store_true", help="small shapes and short runs")

    verb("doctor", doctor, "what is installed, what is missing, and the command that mends it")

    one = verb("demo", demo, "the whole path on a real model, with a report page")
    one.add_argument("--directory", metavar="DIR", default="build/demo", help="default: build/demo")
    return root


def _bytes(size: str) -> int:
    """A number of bytes as people write it: 500MB, 2GiB, 1000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", size.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GiB, got {size!r}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


def _shown(report: Report, status: int = 0) -> Outcome:
    return status, report.fields, lambda: _text(report)


def _text(report: Report) -> str:
    """The report, and under it one line for each layer or step: its numbers, and ranges of its lists of numbers."""
    lines = [str(report)]
    for name, rows in report.fields.items():
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            lines += ["", name] if rows else []
            for row in rows:
                cells = ((key, _cell(value)) for key, value in row.items())
                lines.append("  " + ", ".join(f"{key} {cell}" for key, cell in cells if cell))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        numbers = value and all(isinstance(item, int | float) for item in value)
        return f"{_cell(min(value))} to {_cell(max(value))}" if numbers else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def inspect(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.verbs.inspect import inspect as run

    with bar("inspect") as progress:
        return _shown(run(arguments.model, text=arguments.text, progress=progress))


def convert(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.rank import Goal, page

    goal = Goal.asked(rank=arguments.rank, energy=arguments.energy, min_cosine=arguments.min_cosine)
    if goal is None and not arguments.gauge:
        raise UsageError("convert: expected a rewrite (--gauge, --rank, --energy, --min-cosine)")
    if goal is None and arguments.calibration:
        raise UsageError("convert: --calibration goes with --rank, --energy or --min-cosine")
    from gaugekit.rewrite import Later
    from gaugekit.verbs.convert import convert as run

    depends = {"goal": goal and goal.options, "gauge": arguments.gauge, "rows": arguments.rows}
    with bar("convert") as progress:
        return _shown(
            run(
                arguments.model,
                arguments.out,
                Later(depends, functools.partial(_rewrites, arguments, goal)),
                dense=arguments.dense,
                dtype=arguments.dtype,
                calibration=arguments.calibration,
                pack=arguments.pack,
                progress=progress,
                pages=page.pages,
            )
        )


def _rewrites(arguments: argparse.Namespace, goal, folder: Path) -> list:
    """The rewrites a conversion was asked for; ``folder`` keeps what was found out about them."""
    from gaugekit.checkpoint.reader import Checkpoint
    from gaugekit.symmetry import GaugeFix

    rewrites, ranks = [], None
    if goal is not None:
        from gaugekit.rank import prepare

        with bar("calibrate") as progress:
            more = {"work_directory": folder, "progress": progress}
            truncate = prepare(arguments.model, arguments.calibration, **goal.options, **more)
        rewrites, ranks = [truncate], truncate.of(Checkpoint(arguments.model).config)
    if arguments.gauge:
        rewrites.append(GaugeFix(rows=arguments.rows, key_ranks=ranks))
    return rewrites


def heal(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.verbs.heal import heal_directory

    with bar("heal") as progress:
        return _shown(
            heal_directory(
                arguments.student,
                arguments.teacher,
                arguments.out,
                arguments.text,
                parameters=arguments.parameters,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                progress=progress,
            )
        )


def verify(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.verbs.verify import verify as run

    with bar("verify") as progress:
        report = run(
            arguments.a,
            arguments.b,
            text=arguments.text,
            dtype=arguments.dtype,
            pool=arguments.pool,
            progress=progress,
        )
    return _shown(report, 0 if report["ok"] else 1)


def pack(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.codec import pack as run

    with bar("pack") as progress:
        return _shown(
            run(
                arguments.source,
                arguments.target,
                model=arguments.model,
                verify=arguments.verify,
                memory_bytes=arguments.memory,
                progress=progress,
            )
        )


def unpack(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.codec import unpack as run

    with bar("unpack") as progress:
        return _shown(
            run(arguments.source, arguments.target, memory_bytes=arguments.memory, progress=progress)
        )


def bench(arguments: argparse.Namespace) -> Outcome:
    script = Path(__file__).resolve().parents[3] / "bench" / "run.py"
    if not script.is_file():
        raise ValueError(f"expected a source checkout, with its bench folder; {script} does not exist")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device: expected a GPU that torch can see; there is none here")
    spec = importlib.util.spec_from_file_location("gaugekit_bench", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, failed = module.run(arguments.op, arguments.device, arguments.quick)
    return (1 if failed else 0), rows, lambda: module.table(rows)


def doctor(arguments: argparse.Namespace) -> Outcome:
    from gaugekit import doctor as module

    report = module.report()
    return 0, report.fields, lambda: module.text(report)


def demo(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.demo import steps as module

    report = module.run(arguments.directory)
    return (
        (0 if module.holds(report) else 1),
        report.fields,
        lambda: module.text(report, colour=sys.stdout.isatty()),
    )
