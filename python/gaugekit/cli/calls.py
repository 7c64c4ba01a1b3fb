"""One call for each verb: what the command line asks for, as the function of the same name takes it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gaugekit.cli import streams
from gaugekit.cli.refusals import UsageError
from gaugekit.files.ranks import Ranks
from gaugekit.progress import bar
from gaugekit.report import Report

BENCH = Path(__file__).resolve().parents[1] / "bench" / "run.py"
Outcome = tuple[int, Any, Callable[[], str]]  # exit status, what --json prints, what is printed without it

if TYPE_CHECKING:
    from gaugekit.rank import Goal


def _shown(report: Report, status: int = 0) -> Outcome:
    return status, report.fields, lambda: str(report)


@contextlib.contextmanager
def _ranks() -> Iterator[Ranks | None]:
    """The processes of torchrun that share this call; None where there is one."""
    ranks = Ranks.of_torchrun()
    with contextlib.nullcontext() if ranks is None else ranks:
        yield ranks


@contextlib.contextmanager
def _bar(label: str, ranks: Ranks | None) -> Iterator[Callable[[int, int], None] | None]:
    """The progress of the whole, which rank 0 alone shows."""
    with bar(label) if ranks is None or ranks.leads else contextlib.nullcontext() as progress:
        yield progress


def inspect(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.verbs.inspect import inspect as run

    with bar("inspect") as progress:
        return _shown(run(arguments.model, text=arguments.text, progress=progress))


def convert(arguments: argparse.Namespace) -> Outcome:
    if arguments.slice is not None:
        return _slice(arguments)
    for name in ("rotation", "drop", "quantize", "slice_head"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')}: expected beside --slice, got it without")
    from gaugekit.rank import Goal, page

    goal = Goal.asked(rank=arguments.rank, energy=arguments.energy, min_cosine=arguments.min_cosine)
    if goal is None and not arguments.gauge:
        raise UsageError("expected a rewrite (--gauge, --rank, --energy, --min-cosine, --slice), got none")
    if goal is None and arguments.calibration:
        from gaugekit.verbs.convert import NOBODY_ASKS

        raise UsageError(f"--{NOBODY_ASKS}")
    if arguments.rows and not arguments.gauge:
        raise UsageError("--rows: expected beside --gauge, got it without")
    rows = arguments.rows or "balanced"
    from gaugekit.rewrite import Later
    from gaugekit.verbs.convert import convert as run

    depends = {"goal": goal and goal.options, "gauge": arguments.gauge, "rows": rows}
    with _ranks() as ranks, _bar("convert", ranks) as progress:
        return _shown(
            run(
                arguments.model,
                arguments.out,
                Later(depends, functools.partial(_rewrites, arguments, goal, rows)),
                dense=arguments.dense,
                dtype=arguments.dtype,
                calibration=arguments.calibration,
                pack=arguments.pack,
                progress=progress,
                pages=page.pages,
                ranks=ranks,
            )
        )


def _slice(arguments: argparse.Namespace) -> Outcome:
    others = ("gauge", "rows", "rank", "energy", "min_cosine", "dense")
    if beside := [name for name in others if getattr(arguments, name) not in (None, False)]:
        names = ", ".join("--" + name.replace("_", "-") for name in beside)
        raise UsageError(f"--slice: expected without {names}: a sliced model has no plain layout to rewrite")
    if arguments.calibration is None:
        raise UsageError(
            "--slice: expected --calibration FILE, a text that says which directions matter; got none"
        )
    from gaugekit.slicing import slice as run

    with (
        _ranks() as ranks,
        _bar("calibrate", ranks) as calibrating,
        _bar("convert", ranks) as progress,
        _bar("bits-back", ranks) as coding,
    ):
        return _shown(
            run(
                arguments.model,
                arguments.out,
                arguments.slice,
                calibration=arguments.calibration,
                rotation=arguments.rotation or "auto",
                drop=arguments.drop or 0.0,
                head=arguments.slice_head,
                dtype=arguments.dtype,
                quantize=arguments.quantize,
                pack=arguments.pack,
                progress=progress,
                calibrating=calibrating,
                coding=coding,
                ranks=ranks,
            )
        )


def _rewrites(arguments: argparse.Namespace, goal: Goal | None, rows: str, folder: Path) -> list:
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
        rewrites.append(GaugeFix(rows=rows, key_ranks=ranks))
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
    if arguments.certificate is not None and arguments.b is None:
        return _certificate(arguments)
    if missing := [name.upper() for name in ("a", "b") if getattr(arguments, name) is None]:
        raise UsageError(f"expected {', '.join(missing)}, got none")
    if arguments.perplexity is not None:
        return _perplexity(arguments)
    from gaugekit.verbs.verify import verify as run

    with bar("verify") as progress:
        report = run(
            arguments.a,
            arguments.b,
            text=arguments.text,
            dtype=arguments.dtype,
            pool=arguments.pool,
            certificate=arguments.certificate,
            progress=progress,
        )
    return _shown(report, 0 if report["ok"] else 1)


def _certificate(arguments: argparse.Namespace) -> Outcome:
    for name in ("dtype", "pool", "perplexity"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name}: expected without --certificate, which says so itself, or beside A and B"
            )
    from gaugekit.verbs.verify import check_certificate as run

    with bar("verify") as progress:
        report = run(arguments.certificate, arguments.a, text=arguments.text, progress=progress)
    return _shown(report, 0 if report["ok"] else 1)


def _perplexity(arguments: argparse.Namespace) -> Outcome:
    for name in ("text", "pool", "certificate"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--perplexity: expected without --{name}")
    from gaugekit.verbs.perplexity import compare_perplexity as run

    with bar("perplexity") as progress:
        return _shown(
            run(arguments.a, arguments.b, arguments.perplexity, dtype=arguments.dtype, progress=progress)
        )


def pack(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.codec import pack as run

    with _ranks() as ranks, _bar("pack", ranks) as progress:
        return _shown(
            run(
                arguments.source,
                arguments.target,
                symbols=arguments.symbols,
                verify=arguments.verify,
                memory_bytes=arguments.memory,
                progress=progress,
                ranks=ranks,
            )
        )


def unpack(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.codec import unpack as run

    with _ranks() as ranks, _bar("unpack", ranks) as progress:
        more = {"memory_bytes": arguments.memory, "progress": progress, "ranks": ranks}
        return _shown(run(arguments.source, arguments.target, **more))


def serve(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.serving import serve as run

    def announce(address: str) -> None:
        name = shlex.quote(arguments.directory)
        streams.put(sys.stderr, f"gaugekit serve: {address}/v1 answers for model {name}; Ctrl-C ends it")

    return _shown(
        run(
            arguments.directory,
            host=arguments.host,
            port=arguments.port,
            continuous_batching=arguments.continuous_batching,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            packed=arguments.packed,
            cache=arguments.cache,
            more=arguments.more,
            announce=announce,
        )
    )


def benchmarks() -> ModuleType:
    """``bench/run.py``, of the source checkout or as the wheel brings it."""
    if not BENCH.is_file():
        raise ValueError(f"expected gaugekit's own benchmarks, got no {BENCH}: install gaugekit anew")
    spec = importlib.util.spec_from_file_location("gaugekit_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench(arguments: argparse.Namespace) -> Outcome:
    return benchmarks().measure(arguments)


def doctor(arguments: argparse.Namespace) -> Outcome:
    from gaugekit import doctor as module

    return _shown(module.report())


def demo(arguments: argparse.Namespace) -> Outcome:
    from gaugekit.demo import steps as module

    report = module.run(arguments.directory)
    own = "next: gaugekit pack MODEL OUT, with a model of your own; gaugekit verify A B proves it"
    return 0 if module.holds(report) else 1, report.fields, lambda: f"{module.text(report)}\n{own}"
