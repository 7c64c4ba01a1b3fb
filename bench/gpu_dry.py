"""The run on a GPU, rehearsed without one, on the software of the machine that has it (make gpu-dry).

The binaries are built and loaded, everything is imported, the tests for a GPU are collected, every launch that they and
the benches make is recorded and compiled for sm_90, and the schedule's bookkeeping runs on a clock of its own, with
kills and failures. What is left to chance is the chip. The exit status is 0 only if all of it went well.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu  # noqa: E402
from gpu_pieces import ROOT, SECONDS, gpu_test_files  # noqa: E402
from gpu_rehearsal import faults  # noqa: E402

FOLDER = ROOT / "build" / "gpu"
RECORDER = ROOT / "tests" / "laws" / "launches.py"
ARCHITECTURE, OTHER_ARCHITECTURES = "90", ("80", "89", "100")
PROCESSES = str(min(16, os.cpu_count() or 1))
WITHOUT_GPU = ("ops", "codec", "nn", "laws")  # folders of tests that this software can run without a GPU


class Wrong(Exception):
    """What a step found; the steps after it are taken all the same."""


def asked(command: list[str], required: tuple[str, ...] = gpu.BACKENDS, **more: str):
    """The program's end and what it printed, in the environment of a run on a GPU."""
    environment = gpu.environment(required) | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def last(done) -> str:
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])


def python(program: str) -> str:
    done = asked([sys.executable, "-W", "ignore", "-c", program])
    if done.returncode:
        raise Wrong(last(done))
    return done.stdout.strip()


def versions() -> str:
    """The packages are those that gpu-constraints.txt names."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (HERE / "gpu-constraints.txt").read_text(), re.MULTILINE)
    differ = []
    for name, expected in pins:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if name in ("torch", "triton", "transformers") and found != expected:
            differ.append(f"{name}: expected {expected}, got {found}")
        elif found.split(".")[:2] != expected.split(".")[:2]:
            differ.append(f"{name}: expected {expected} or a later patch, got {found}")
    if sys.version_info[:2] != (3, 12):
        differ.append(f"Python: expected 3.12, got {sys.version.split()[0]}")
    if differ:
        raise Wrong("; ".join(differ))
    return f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {v}" for name, v in pins[:4])


def binaries() -> str:
    """Both binaries stand beside the package, built from these sources; built here where they do not."""
    absent = gpu.missing().keys() & {"cpu", "cuda"}
    if not absent:
        return "both fit the sources already"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    archs = os.environ.get("GAUGEKIT_CUDA_ARCHS", "90a")
    done = asked(command, (), GAUGEKIT_CUDA_ARCHS=archs, MAX_JOBS=PROCESSES)
    absent = gpu.missing()
    if absent.keys() & {"cpu", "cuda"}:
        raise Wrong("; ".join(f"{name}: {why}" for name, why in absent.items()) + "\n" + last(done))
    return f"built for {archs}"


def loaded() -> str:
    """They load, and every operator that csrc/cuda registers has a kernel of its own there."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    names = sorted(set(re.findall(r'\bimpl\("(\w+)"', sources)))
    if not names:
        raise Wrong("no registration was found in csrc/cuda")
    program = (
        "import torch, gaugekit.ops; from gaugekit._library import implementation; "
        f"print(*(name for name in {names} if not implementation(name, 'CUDA')))"
    )
    without = python(program)
    if without:
        raise Wrong(f"no CUDA kernel is registered for {without}")
    return f"cpu, cuda and triton; on CUDA {', '.join(names)}"


def imports() -> str:
    """Every module is imported, the integrations apart that say they do not fit this transformers, or are vLLM's."""
    names = []
    for package, folder in (("gaugekit", "python/gaugekit"), ("gaugekit.triton_kernels", "triton_kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *parts)).removesuffix(".__init__"))
    names = [name for name in names if not name.endswith("__main__")]
    program = (
        f"import importlib\nfor name in {names}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        known = 'pip install gaugekit[' in str(error) or error.name == 'vllm'\n"
        "        if not known: raise\n"
        "        print(name)\n"
    )
    unfit = python(program).split()
    return f"{len(names) - len(unfit)} modules" + (
        f"; {', '.join(unfit)} need another extra" if unfit else ""
    )


def collected(folders: list[str], *options: str, **environment: str) -> int:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        *folders,
    ]
    done = asked(command, **environment)
    counted = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, re.MULTILINE)
    if done.returncode or not counted:
        raise Wrong(last(done))
    return int(counted[1])


def gpu_tests() -> str:
    """The tests for a GPU are collected as there, each file by itself being able to fail."""
    files = gpu_test_files()
    count = collected(files, "-p", "gpu_tests", "-m", "gpu", GAUGEKIT_TEST_AS_GPU="1")
    return f"{count} tests for a GPU in {len(files)} files"


def other_tests() -> str:
    return f"{collected([f'tests/{folder}' for folder in WITHOUT_GPU])} tests in {', '.join(WITHOUT_GPU)}"


def cuda_sources() -> str:
    """Every .cu compiles for sm_80 and sm_90a without a spill."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = asked([*command, "tests/laws/test_ahead_of_time_cuda.py"], GAUGEKIT_EVERY_ARCHITECTURE="1")
    if done.returncode:
        raise Wrong(last(done))
    return done.stdout.strip().splitlines()[-1]


def launches() -> str:
    """Every launch of those tests and of the benches is recorded and compiled; spills have their reason in a table."""
    return compiled_for(ARCHITECTURE)


def other_architectures() -> str:
    """What is shipped compiles for the other cards, too, and fits their shared memory."""
    return "\n".join(compiled_for(card, "--of", "shipped") for card in OTHER_ARCHITECTURES)


def compiled_for(architecture: str, *kinds: str) -> str:
    """Launches recorded on a card of that kind and compiled for it; ``Wrong`` where one of them does not fit."""
    if not RECORDER.exists():
        raise Wrong(f"{RECORDER.relative_to(ROOT)} is missing")
    record, report = (FOLDER / f"{name}-{architecture}.jsonl" for name in ("launches", "compiled"))
    report.unlink(missing_ok=True)
    program, card = [sys.executable, str(RECORDER)], ["--arch", architecture]
    recorded = asked([*program, "record", str(record), *card, *kinds], ("cpu", "triton"))
    options = [*card, "--jobs", PROCESSES, "--report", str(report)]
    compiled = asked([*program, "compile", str(record), *options], ("cpu", "triton"))
    summary = [(done.stdout.strip().splitlines() or ["no output"])[-1] for done in (recorded, compiled)]
    if report.exists() and architecture == ARCHITECTURE:
        summary += spills([json.loads(line) for line in report.read_text().splitlines()])
    if recorded.returncode or compiled.returncode:
        said = [recorded.stderr, compiled.stdout, compiled.stderr]
        raise Wrong("\n".join(summary + [text.strip() for text in said if text.strip()]))
    return "\n".join(summary)


def spills(rows: list[dict]) -> list[str]:
    """The launches that spill, counted for each reason of the table; those that are in no table are said so."""
    sys.path.insert(0, str(RECORDER.parent))
    from spills import reason

    counts = Counter((row["kernel"], reason(row) or "in no table") for row in rows if row.get("spills"))
    lines = [f"  {count} × {kernel}: {why}" for (kernel, why), count in sorted(counts.items())]
    return [f"spills: {sum(counts.values())}", *lines]


def schedule() -> str:
    """The bookkeeping, with everything that can go wrong."""
    wrong, longest = faults()
    if wrong:
        raise Wrong("\n".join(wrong))
    return (
        f"{longest:.0f} of {SECONDS} s at the longest; hangs, kills and failures are recorded and passed by"
    )


STEPS: dict[str, Callable[[], str]] = {
    "versions": versions,
    "binaries": binaries,
    "loading": loaded,
    "imports": imports,
    "tests for a GPU": gpu_tests,
    "other tests": other_tests,
    "CUDA sources": cuda_sources,
    "launches": launches,
    "other architectures": other_architectures,
    "schedule": schedule,
}


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    summary, failed = [], 0
    for name, step in STEPS.items():
        begin = time.monotonic()
        try:
            verdict, found = "well", step()
        except Wrong as error:
            verdict, found, failed = "WRONG", str(error), failed + 1
        took = time.monotonic() - begin
        print(f"{name}: {verdict} ({took:.0f} s)" + (f"\n{found}" if verdict == "WRONG" else ""), flush=True)
        summary.append(f"{verdict:5}  {name}: " + found.replace("\n", "\n       "))
    print("", *summary, sep="\n")
    print(f"{failed} of {len(STEPS)} steps went wrong" if failed else "all is well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
