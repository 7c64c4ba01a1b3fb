"""Times every registered case against its rivals and prints one row a rival (house law 8).

    python bench/run.py                        # all operators, this machine's CPU
    python bench/run.py --op rans --quick      # one operator, a fraction of the time
    python bench/run.py --device cuda --save   # GPU rows, kept under bench/results/
    python bench/run.py --op packed_linear --only 4096x4096 --only "1 threads" --save   # some cases of one operator

``ratio`` is the rival's time over ours, the median of interleaved pairs: above 1 we are faster. ``without_us`` is that
ratio against the rival a good user would write today.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from registry import BENCHMARKS, ONLY, Case, wanted  # noqa: E402

COLUMNS = ["op", "shape", "dtype", "baseline", "median_ms", "baseline_ms", "ratio", "share_of_peak", "label"]


def machine(device: str) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """This checkout's commit, marked when files differ from it."""
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


class Clock:
    """Seconds one call takes; on a GPU by events, with the L2 cache flushed before each call."""

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if device == "cuda" else None

    def __call__(self, call, repeat: int = 1) -> float:
        if self.device == "cuda":
            self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                call()
            stop.record()
            torch.cuda.synchronize()
            return start.elapsed_time(stop) / 1e3 / repeat
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - begin) / repeat


def peak_rates(device: str, dtype: str, clock: Clock, known: dict) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written both counted), operations a second of a large product."""
    if (device, dtype) not in known:
        size = (1 << 30) if device == "cuda" else (1 << 27)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        kind = getattr(torch, dtype, torch.float32)
        kind = kind if kind.is_floating_point and kind.itemsize > 1 else torch.float32
        width = 8192 if device == "cuda" else 1024
        a = torch.ones(width, width, device=device, dtype=kind)
        for call in (lambda: target.copy_(source), lambda: a @ a):
            clock(call)
        copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
        product = min(clock(lambda: a @ a) for _ in range(5))
        known[device, dtype] = (2 * size / copy, 2 * width**3 / product)
    return known[device, dtype]


def peak_bytes(call, device: str) -> int | None:
    """Memory the call needs at its peak beyond what was there before; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{name} is not in /proc/self/status")


DISTURBED = 0.05  # of the processors' time taken by others during a call: its round is then left out
TWO_CORES = 1.9  # times as fast is a product of matrices on two threads where both have a core to themselves


def of_others() -> tuple[float, float, float]:
    """Wall clock, seconds all processors were busy or taken by the hypervisor, seconds this process used."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return time.perf_counter(), 0.0, 0.0
    busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for a disk
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def share_of_others(before: tuple[float, float, float]) -> float:
    """Share of the processors' time since ``before`` that went to others; 0 where the clock of /proc is too coarse."""
    wall, busy, own = (b - a for a, b in zip(before, of_others(), strict=True))
    foreign = busy - own
    return max(0.0, foreign / (wall * os.cpu_count())) if foreign > 0.03 else 0.0


def shares_of_neighbours(times: dict[str, list[float]], control: tuple[str, str] | None) -> list[float]:
    """For each round, what /proc cannot see: the share that others took on the hardware below a virtual machine.

    Both calls of ``control`` are held against the fastest on one thread. A slow call on one thread counts as much as a
    slow one on two: it would make the second thread look better than it is.
    """
    if control is None or not times["ours"]:
        return [0.0] * len(times["ours"])
    one, two = (times[name] for name in control)
    best = min(one)
    return [max(1 - best / a, 1 - best / (TWO_CORES * b)) for a, b in zip(one, two, strict=True)]


def enough(shares: list[float], spent: float, seconds: float, rounds: int = 25) -> bool:
    """So many undisturbed ``rounds``, and ``seconds``; the end at eight times that, but never before the fifth."""
    undisturbed = sum(share <= DISTURBED for share in shares)
    return len(shares) >= 5 and (spent >= 8 * seconds or (undisturbed >= rounds and spent >= seconds))


def measure(case: Case, seconds: float, clock: Clock, known: dict) -> list[dict]:
    """One row for each rival of the case."""
    threads = torch.get_num_threads()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    times: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}

    def disturbances(name: str) -> list[float]:
        """For each round, the largest share that others took from ours, from this rival or from the control."""
        neighbours = shares_of_neighbours(times, case.control)
        return [max(shares) for shares in zip(others["ours"], others[name], neighbours, strict=True)]

    try:
        case.check()
        calls = {"ours": case.ours, **{name: call for name, call in case.rivals.items() if call is not None}}
        repeats = {}
        for name, call in calls.items():
            call()
            repeats[name] = max(1, min(1000, int(2e-3 / max(clock(call), 1e-7))))
        times |= {name: [] for name in calls}
        others |= {name: [] for name in calls}
        order, begin = list(calls), time.perf_counter()
        while not enough(disturbances("ours"), time.perf_counter() - begin, seconds, case.rounds):
            for name in order:
                before = of_others()
                times[name].append(clock(calls[name], repeats[name]))
                others[name].append(share_of_others(before) if case.device == "cpu" else 0.0)
            order.append(order.pop(0))  # so that no call always follows the same one
        memory = peak_bytes(case.ours, case.device)
        bandwidth, rate = peak_rates(case.device, case.dtype, clock, known)
    finally:
        used = torch.get_num_threads()
        torch.set_num_threads(threads)

    def kept(name: str) -> list[int]:
        """The rounds that count for ours beside this rival: those in which both were left alone, or nearly."""
        shares = disturbances(name)
        limit = max(DISTURBED, sorted(shares)[4])
        return [i for i, share in enumerate(shares) if share <= limit]

    ours = [times["ours"][i] for i in kept("ours")]
    p20, median, p80 = (1e3 * q for q in _quantiles(ours))
    floor = max(case.bytes_moved / bandwidth, case.flops / rate)
    rounds = {name: kept(name) for name in calls if name != "ours"}
    ratios = {
        name: statistics.median(times[name][i] / times["ours"][i] for i in found)
        for name, found in rounds.items()
    }
    all_rounds = {
        name: statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True))
        for name in rounds
    }
    rows = []
    for name in case.rivals:
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "device": case.device,
                "threads": used if case.device == "cpu" else None,
                "label": case.label,
                "baseline": name,
                "absent": name not in calls,
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "baseline_ms": (
                    1e3 * statistics.median(times[name][i] for i in rounds[name]) if name in calls else None
                ),
                "ratio": ratios.get(name),
                "ratio_all_rounds": all_rounds.get(name),
                "share_of_peak": floor / (median / 1e3) if floor else None,
                "peak_bytes": memory,
                "without_us": ratios.get(case.without_us),
                "rounds": len(rounds.get(name, ours)),
                "rounds_disturbed": len(times["ours"]) - len(rounds.get(name, ours)),
                **case.extra,
            }
        )
    return rows


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))


def load_benchmarks() -> None:
    """Imports every ``ops/bench_*.py`` beside this file; each registers itself."""
    for path in sorted((HERE / "ops").glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def run(ops: list[str] | None, device: str, quick: bool, log=sys.stderr) -> tuple[list[dict], int]:
    """All rows of the named operators (all if None), and how many cases failed their check."""
    load_benchmarks()
    unknown = [op for op in ops or [] if op not in BENCHMARKS]
    if unknown:
        raise ValueError(f"op must be one of {', '.join(sorted(BENCHMARKS))}; got {', '.join(unknown)}")
    clock, known, rows, failed = Clock(device), {}, [], 0
    where = {"machine": machine(device), "commit": commit()}
    for op in ops or sorted(BENCHMARKS):
        for case in BENCHMARKS[op](device, quick):
            if not wanted(f"{case.shape} {case.dtype} {case.label}"):
                continue
            try:
                rows += [row | where for row in measure(case, 0.4 if quick else case.seconds, clock, known)]
            except AssertionError as error:
                failed += 1
                print(f"{case.op} {case.shape} {case.dtype}: wrong result, not timed: {error}", file=log)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", help="an operator to measure (repeatable); default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes and short runs")
    parser.add_argument(
        "--json", action="store_true", help="print the rows as one JSON list and nothing else"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="only cases with this in shape, dtype or label (repeatable)",
    )
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see; none is here")
    ONLY[:] = arguments.only
    try:
        rows, failed = run(arguments.op, arguments.device, arguments.quick)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(rows) if arguments.json else table(rows))
    if arguments.save:
        for op in sorted({row["op"] for row in rows}):
            path = save([row for row in rows if row["op"] == op], op, arguments.device)
            print(f"kept {path.relative_to(HERE.parent)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
