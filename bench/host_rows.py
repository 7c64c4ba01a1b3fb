"""Rows of a CPU: calls in interleaved rounds, those in which others took the processors left out."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from registry import Case


def clock(call, repeat: int = 1, now=None) -> float:
    """Seconds one call takes, by the clock ``now`` (None: the one on the wall)."""
    now = now or time.perf_counter
    begin = now()
    for _ in range(repeat):
        call()
    return (now() - begin) / repeat


def peak_rates(dtype: str, known: dict) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written both counted), operations a second of a large product."""
    if dtype not in known:
        size, width = 1 << 27, 1024
        source = torch.ones(size, dtype=torch.uint8)
        target = torch.ones_like(source)
        kind = getattr(torch, dtype, torch.float32)
        kind = kind if kind.is_floating_point and kind.itemsize > 1 else torch.float32
        a = torch.ones(width, width, dtype=kind)
        for call in (lambda: target.copy_(source), lambda: a @ a):
            clock(call)
        copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
        product = min(clock(lambda: a @ a) for _ in range(5))
        known[dtype] = (2 * size / copy, 2 * width**3 / product)
    return known[dtype]


def peak_bytes(call) -> int | None:
    """Memory the call needs at its peak beyond what was there before; None where the system does not tell."""
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


def block(threads: int) -> float:
    """Seconds over which a call is timed: torch's threads but one spin for some milliseconds when their work is done,
    on the cores that ours come to.
    """
    return 2e-3 if threads == 1 else 60e-3


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


def measure(case: Case, seconds: float, known: dict) -> list[dict]:
    """One row for each rival of the case; ``known`` keeps the machine's peaks from case to case."""
    threads = torch.get_num_threads()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    try:
        case.check()
        times, others = _rounds(case, seconds)
        memory = peak_bytes(case.ours)
        peaks = peak_rates(case.dtype, known)
    finally:
        used = torch.get_num_threads()
        torch.set_num_threads(threads)
    return _rows(case, times, others, memory, peaks, used)


def _disturbances(name: str, case: Case, times: dict, others: dict) -> list[float]:
    """For each round, the largest share that others took from ours, from this rival or from the control."""
    neighbours = shares_of_neighbours(times, case.control)
    return [max(shares) for shares in zip(others["ours"], others[name], neighbours, strict=True)]


def _rounds(case: Case, seconds: float) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each call in each round, and the share of the processors that others took meanwhile."""
    calls = {"ours": case.ours, **{name: call for name, call in case.rivals.items() if call is not None}}
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(1000, int(case.block / max(clock(call), 1e-7))))
    times, others = ({name: [] for name in calls} for _ in range(2))
    order, begin = list(calls), time.perf_counter()
    while not enough(
        _disturbances("ours", case, times, others), time.perf_counter() - begin, seconds, case.rounds
    ):
        for name in order:
            before = of_others()
            if case.processor_time:
                times[name].append(clock(calls[name], repeats[name], time.process_time))
            else:
                times[name].append(clock(calls[name], repeats[name]))
            others[name].append(0.0 if case.processor_time else share_of_others(before))
        order.append(order.pop(0))  # so that no call always follows the same one
    return times, others


def _rows(case: Case, times: dict, others: dict, memory, peaks: tuple[float, float], used: int) -> list[dict]:
    def kept(name: str) -> list[int]:
        """The rounds that count for ours beside this rival: those in which both were left alone, or nearly."""
        shares = _disturbances(name, case, times, others)
        limit = max(DISTURBED, sorted(shares)[4])
        return [i for i, share in enumerate(shares) if share <= limit]

    ours = [times["ours"][i] for i in kept("ours")]
    p20, median, p80 = (1e3 * q for q in quantiles(ours))
    floor = max(case.bytes_moved / peaks[0], case.flops / peaks[1])
    rounds = {name: kept(name) for name in times if name != "ours"}
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
                "threads": used,
                "label": case.label,
                "baseline": name,
                "absent": name not in times,
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "baseline_ms": (
                    1e3 * statistics.median(times[name][i] for i in rounds[name]) if name in times else None
                ),
                "ratio": ratios.get(name),
                "ratio_all_rounds": all_rounds.get(name),
                "share_of_peak": floor / (median / 1e3) if floor else None,
                "peak_bytes": memory,
                "without_us": without_us(case, ratios),
                "rounds": len(rounds.get(name, ours)),
                "rounds_disturbed": len(times["ours"]) - len(rounds.get(name, ours)),
                **case.extra,
            }
        )
    return rows


def without_us(case: Case, ratios: dict[str, float]) -> float | None:
    """The ratio to the rival that counts, or to the fastest of those that do."""
    named = (case.without_us,) if isinstance(case.without_us, str) else case.without_us
    return min((ratios[name] for name in named if name in ratios), default=None)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))
