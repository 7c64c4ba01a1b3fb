"""One run on a GPU: tests, benches, tiles and profiles within eight minutes, every line on the disk as it is found.

    python bench/gpu.py                           # the whole schedule (make gpu)
    python bench/gpu.py --piece rans --piece tests   # some pieces again (make gpu-rerun PIECE="rans tests")
    python bench/gpu.py --list                    # what it would run, and for how long
    python bench/gpu.py --keep OUT                # the rows that came back become files of bench/results/

Nothing is installed and nothing is fetched; the binaries beside the package are taken where they were built from these
sources, else built first. Files go to $OUT, or to build/gpu/out: pieces.jsonl (what ran, how it ended), tests.jsonl,
rows.jsonl, measures.jsonl, smoke.xml, tests.xml, log.txt and, last, table.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu_ledger as ledger  # noqa: E402
from gpu_pieces import RERUN_SECONDS, ROOT, SECONDS, pieces  # noqa: E402
from gpu_runner import Piece, RealMachine, Runner, Stopped  # noqa: E402

BUILD_SECONDS = 120
BACKENDS = ("cpu", "cuda", "triton")


def commit() -> str:
    """GAUGEKIT_COMMIT, since the files may travel without .git, else git's."""
    given = os.environ.get("GAUGEKIT_COMMIT", "")
    if given:
        return given
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty=-modified", "--abbrev=12", "--exclude=*"],
        cwd=HERE, capture_output=True, text=True,
    )  # fmt: skip
    return asked.stdout.strip() or "unknown"


def environment(required: tuple[str, ...]) -> dict[str, str]:
    """What every piece runs in: this checkout as it stands, its compilations shared, a missing backend an error."""
    cache = ROOT / "build" / "gpu"
    paths = [str(HERE / "checkout"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "GAUGEKIT_COMMIT": commit(),
        "GAUGEKIT_REQUIRE": ",".join(required),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
        "HF_HUB_OFFLINE": "1",
    }


def missing() -> dict[str, str]:
    """Each backend that does not load here, with the reason; all of them if gaugekit itself does not."""
    program = (
        "import json, sys; from gaugekit._library import backends; found = backends();"
        "json.dump({name: found[name].why for name in found if not found[name].loaded}, sys.stdout)"
    )
    asked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment(()), capture_output=True, text=True
    )
    try:
        return json.loads(asked.stdout)
    except ValueError:
        reason = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        return dict.fromkeys(BACKENDS, reason)


def build_piece() -> Piece:
    return Piece(
        "build", "build", BUILD_SECONDS, (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    )


def ready(runner: Runner) -> tuple[str, ...]:
    """The backends that load, after a build where one of the binaries is missing or of other sources."""
    absent = missing()
    if absent.keys() & {"cpu", "cuda"}:
        runner.stage([build_piece()])
        absent = missing()
    runner.line(event="backends", commit=commit(), missing=absent)
    return tuple(name for name in BACKENDS if name not in absent)


def keep(out: Path, folder: Path = HERE / "results") -> list[Path]:
    """Writes the rows of ``out`` to bench/results/, a file an operator and machine, and returns the files."""
    rows = [row for line in ledger.lines_of(out / ledger.ROWS)[0] for row in line.get("rows", ())]
    about = next((line for line in ledger.lines_of(out / ledger.MEASURES)[0] if "date" in line), {})
    kept = []
    for op, machine in sorted({(row["op"], row["machine"]) for row in rows}):
        # A case measured again, in a second try, stands once, as it came out last.
        chosen = {
            tuple(row.get(key) for key in ("shape", "dtype", "label", "baseline")): row
            for row in rows
            if (row["op"], row["machine"]) == (op, machine)
        }
        record = {
            "piece": op,
            "machine": machine,
            "commit": about.get("commit", "unknown"),
            "date": about.get("date", "unknown"),
            "torch": about.get("torch", "unknown"),
            "rows": list(chosen.values()),
        }
        place = "-".join(re.findall(r"[a-z0-9]+", machine.lower()))
        path = folder / f"{op}-{place}-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        kept.append(path)
    return kept


def run(out: Path, names: list[str], seconds: float) -> bool:
    out.mkdir(parents=True, exist_ok=True)
    chosen = [piece for piece in pieces(out) if not names or piece.name in names]
    machine = RealMachine(out, environment(()))
    runner = Runner(machine, out, seconds)
    try:
        machine.environment = environment(ready(runner))
        well = runner.run(chosen)
    except Stopped:  # while a binary was built
        return False
    print((out / ledger.TABLE).read_text())
    return well


def main(argv: list[str] | None = None) -> int:
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu" / "out").resolve()
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--piece", action="append", default=[], help="run this piece alone (repeatable)")
    parser.add_argument("--list", action="store_true", help="print the pieces and their limits, run nothing")
    parser.add_argument("--keep", type=Path, metavar="OUT", help="turn rows that came back into results")
    arguments = parser.parse_args(argv)
    names = [name for given in arguments.piece for name in given.split()]
    known = [piece.name for piece in pieces(out)]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--piece: expected names among {', '.join(known)}; got {', '.join(unknown)}")
    if arguments.list:
        for piece in pieces(out):
            print(
                f"{piece.limit:4.0f} s  {piece.name}"
                + (f" (beside {piece.stage})" if piece.name != piece.stage else "")
            )
        return 0
    if arguments.keep:
        for path in keep(arguments.keep):
            print(f"kept {path.relative_to(ROOT)}")
        return 0
    return 0 if run(out, names, RERUN_SECONDS if names else SECONDS) else 1


if __name__ == "__main__":
    sys.exit(main())
