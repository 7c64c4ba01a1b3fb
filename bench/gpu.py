"""Everything a GPU at hand should do: the tests marked gpu, then every benchmark, one JSON file a piece.

Each piece runs in a process of its own under a time limit, so that one that hangs costs eight minutes and no more; a
piece already measured at the present commit is skipped, so that the whole can be stopped and called again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import run as bench  # noqa: E402

LIMIT_SECONDS = 480


def measured(piece: str, commit: str) -> bool:
    """Whether results/ holds this piece at this commit from a GPU."""
    for path in (HERE / "results").glob(f"{piece}-*.json"):
        record = json.loads(path.read_text())
        if record["commit"] == commit and all(row.get("device") == "cuda" for row in record["rows"]):
            return True
    return False


def test_piece() -> int:
    """Runs the tests marked gpu; keeps their outcome as a piece of its own."""
    begin = time.time()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=HERE.parent)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    if done.returncode == 0:
        summary = done.stdout.strip().splitlines()[-1]
        seconds = round(time.time() - begin, 1)
        bench.save(
            [{"device": "cuda", "op": "tests", "outcome": summary, "seconds": seconds}], "tests", "cuda"
        )
    return done.returncode


def main() -> int:
    """Runs what is still to be run; the exit status is the number of pieces that failed."""
    bench.load_benchmarks()
    commit, failed = bench.commit(), []
    for piece in ["tests", *sorted(bench.BENCHMARKS)]:
        if measured(piece, commit):
            print(f"{piece}: measured at {commit} already")
            continue
        print(f"{piece}: running", flush=True)
        try:
            if piece == "tests":
                code = test_piece()
            else:
                command = [sys.executable, str(HERE / "run.py"), "--device", "cuda", "--op", piece, "--save"]
                code = subprocess.run(command, timeout=LIMIT_SECONDS).returncode
        except subprocess.TimeoutExpired:
            print(f"{piece}: stopped after {LIMIT_SECONDS} s")
            code = 1
        if code:
            failed.append(piece)
    print("all pieces measured" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
