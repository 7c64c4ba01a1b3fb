"""The pieces of a run on a GPU, the most valuable first: what each runs, beside what, and for how long at most."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gpu_ledger as ledger
from gpu_runner import Piece

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 480  # of a whole run; machines are lent for ten minutes a command
RERUN_SECONDS = 240
PROCESSES = 12  # of tests; each has its own context on the GPU, and most of their time is the compiler's
TEST_SECONDS = 60  # a test that takes longer ends its process, which says where it stood; the others go on
CASE_SECONDS = "0.5"


def gpu_test_files() -> list[str]:
    """The test files with tests for a GPU: the others are not collected, so that none of them can end the run."""
    marked = re.compile(r"\bpytest\.mark\.gpu\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if marked.search(path.read_text())]


def pytest(*arguments: str) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", "-q", "-m", "gpu",
        "--continue-on-collection-errors", *arguments, *gpu_test_files(),
    )  # fmt: skip


def tests(name: str, out: Path, limit: float, smoke: bool) -> Piece:
    environment = {"GAUGEKIT_TEST_LINES": str(out / ledger.TESTS), "GAUGEKIT_TEST_SMOKE": str(int(smoke))}
    command = pytest(
        "-n", str(PROCESSES), "-o", f"faulthandler_timeout={TEST_SECONDS}", f"--junitxml={out / name}.xml"
    )
    return Piece(name, name, limit, command, environment)


def bench(name: str, out: Path, limit: float, *arguments: str, stage: str = "") -> Piece:
    command = (
        sys.executable, str(HERE / "run.py"), "--device", "cuda", "--rows", str(out / ledger.ROWS), *arguments,
    )  # fmt: skip
    return Piece(name, stage or name, limit, command)


def timed(name: str, out: Path, limit: float, op: str, *cases: str) -> Piece:
    """Cases of one operator, the GPU to themselves."""
    words = [word for case in cases for word in ("--case", case)]
    return bench(name, out, limit, "--budget", CASE_SECONDS, "--op", op, *words)


def program(name: str, out: Path, limit: float) -> Piece:
    """One of the small programs beside this file; it appends its lines to what was measured."""
    return Piece(
        name, name, limit, (sys.executable, str(HERE / f"gpu_{name}.py"), str(out / ledger.MEASURES))
    )


def pieces(out: Path) -> list[Piece]:
    """The whole run. The limits together are the time it may take, apart from a build that nobody had done before."""
    return [
        program("ceilings", out, 15),
        tests("smoke", out, 35, smoke=True),
        tests("tests", out, 105, smoke=False),
        bench("once", out, 105, "--once", stage="tests"),
        timed("packed_linear", out, 25, "packed_linear", "batch 1,"),
        timed("rans", out, 25, "rans"),
        timed("shaped_attention", out, 90, "shaped_attention"),
        timed("shaped_combine", out, 20, "shaped_combine"),
        timed("nonlocal_energy", out, 15, "nonlocal_energy"),
        timed("ragged_attention", out, 15, "ragged_attention"),
        timed("gauge_linear", out, 15, "gauge_linear"),
        timed("single_cache_attention", out, 20, "single_cache_attention"),
        timed("packed_linear_16", out, 12, "packed_linear", "batch 16,"),
        timed("packed_linear_256", out, 12, "packed_linear", "batch 256,"),
        program("tiles", out, 42),
        program("profile", out, 33),
    ]
