"""Rows of a GPU: programs of calls on rotated operands, replayed as graphs in interleaved rounds, within a budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backends import NotCapturable, one_line
from host_rows import quantiles, without_us
from registry import Call, Case

MOST_ROUNDS = 15
FEWEST_ROUNDS = 3
COPY_BYTES = 1 << 30
PRODUCT_WIDTH = 8192


@dataclass
class Program:
    """``run`` makes ``calls`` calls, on operands of ``rotated_bytes`` in all; ``refused``: why no graph holds them."""

    run: Callable[[], None]
    calls: int
    rotated_bytes: int | None
    refused: str = ""


def program(call: Callable, backend) -> Program:
    """The call on copies of its operands that together are larger than the cache, so that none is found there."""
    rotates = isinstance(call, Call)
    calls = call.copies(2 * backend.cache_bytes) if rotates else [call]
    size = len(calls) * call.bytes if rotates else None
    try:
        return Program(backend.graph(calls), len(calls), size)
    except NotCapturable as error:

        def run():
            for one in calls:
                one()

        run()
        return Program(run, len(calls), size, str(error))


def rounds(programs: dict[str, Program], backend, budget: float) -> dict[str, list[float]]:
    """Seconds of one call of each program, a value a round: ``MOST_ROUNDS``, or as many as ``budget`` seconds allow."""
    part = budget / MOST_ROUNDS / len(programs)
    repeats = {}
    for name, one in programs.items():
        backend.seconds(one.run, 1)
        repeats[name] = max(1, min(1000, int(part / max(backend.seconds(one.run, 1), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in programs}
    spent, order = 0.0, list(programs)
    for count in range(MOST_ROUNDS):
        if count >= FEWEST_ROUNDS and spent >= budget:
            break
        for name in order:
            seconds = backend.seconds(programs[name].run, repeats[name])
            spent += seconds
            times[name].append(seconds / repeats[name] / programs[name].calls)
        order.append(order.pop(0))  # so that no program always follows the same one
    return times


def peaks(dtype: str, backend, known: dict) -> dict[str, float]:
    """Bytes a second of a large copy (read and written both counted), operations a second of a large product; both of
    random numbers, since a product of ones draws less power and runs at a higher clock.
    """
    kind = getattr(torch, dtype, torch.bfloat16)
    kind = kind if kind.is_floating_point and kind.itemsize > 1 else torch.bfloat16

    def best(call, count=5):
        backend.seconds(call, 2)
        return min(backend.seconds(call, 1) for _ in range(count))

    if "copy" not in known:
        size = COPY_BYTES if backend.device == "cuda" else 1 << 24
        source = torch.randint(256, (size,), dtype=torch.uint8, device=backend.device)
        target = torch.empty_like(source)
        known["copy"] = 2 * size / best(lambda: target.copy_(source))
    if kind not in known:
        width = PRODUCT_WIDTH if backend.device == "cuda" else 256
        a, b = (torch.randn(width, width, device=backend.device).to(kind) for _ in range(2))
        known[kind] = 2 * width**3 / best(lambda: a @ b)
    return {"copy_bytes_per_second": known["copy"], "product_flops_per_second": known[kind]}


def measure(case: Case, budget: float, backend, known: dict) -> list[dict]:
    """One row for each rival of the case; ``known`` keeps the peaks from case to case.

    A rival that fails is a row that says why, and the others go on; an error of ours is raised.
    """
    limits = peaks(case.dtype, backend, known)
    case.check()
    programs, refused = {"ours": program(case.ours, backend)}, {}
    for name, call in case.rivals.items():
        if call is None:
            continue
        try:
            programs[name] = program(call, backend)
        except Exception as error:
            refused[name] = one_line(error)
    times = rounds(programs, backend, budget)
    return _rows(case, programs, refused, times, limits, backend.peak_bytes(case.ours))


def _rows(case: Case, programs, refused, times, limits, memory) -> list[dict]:
    p20, median, p80 = quantiles(times["ours"])
    floor = max(
        case.bytes_moved / limits["copy_bytes_per_second"], case.flops / limits["product_flops_per_second"]
    )
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["ours"], strict=True))
        for name, values in times.items()
        if name != "ours"
    }
    share, ours = floor / median if floor else None, programs["ours"]
    rows = []
    for name in case.rivals:
        rival, values = programs.get(name), times.get(name)
        row = {
            "op": case.op,
            "shape": case.shape,
            "dtype": case.dtype,
            "device": "cuda",
            "threads": None,
            "label": case.label,
            "baseline": name,
            "absent": rival is None,
            "median_ms": 1e3 * median,
            "p20_ms": 1e3 * p20,
            "p80_ms": 1e3 * p80,
            "min_ms": 1e3 * min(times["ours"]),
            "baseline_ms": 1e3 * statistics.median(values) if values else None,
            "baseline_min_ms": 1e3 * min(values) if values else None,
            "ratio": ratios.get(name),
            "share_of_peak": share,
            "peak_bytes": memory,
            "without_us": without_us(case, ratios),
            "rounds": len(times["ours"]),
            "graph": not ours.refused,
            "baseline_graph": not rival.refused if rival else None,
            "rotated_bytes": ours.rotated_bytes,
            **limits,
            **case.extra,
        }
        reasons = {"graph_refused": ours.refused, "baseline_graph_refused": rival.refused if rival else ""}
        reasons["refused"] = refused.get(name, "")
        row |= {key: reason for key, reason in reasons.items() if reason}
        if case.goal and case.goal[0] in ("share_of_peak", name):
            reached = share if case.goal[0] == "share_of_peak" else ratios.get(name)
            row |= {"goal": list(case.goal), "goal_reached": reached is not None and reached >= case.goal[1]}
        rows.append(row)
    return rows


def rehearse(case: Case) -> dict[str, str]:
    """The check and each call once, untimed: what it compiles is then there for later. What failed, by name."""
    case.check()
    case.ours()
    failed = {}
    for name, call in case.rivals.items():
        try:
            if call is not None:
                call()
        except Exception as error:
            failed[name] = one_line(error)
    return failed
