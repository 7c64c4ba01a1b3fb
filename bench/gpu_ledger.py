"""What a run on a GPU leaves behind, line by line: nothing that was found out is lost to what comes after it."""

from __future__ import annotations

import json
import os
from pathlib import Path

# At most eight files come back from some machines, so the kinds of lines share them.
PIECES, TESTS, ROWS, MEASURES = "pieces.jsonl", "tests.jsonl", "rows.jsonl", "measures.jsonl"
LOG, TABLE = "log.txt", "table.txt"
LOG_BYTES = 12 << 20  # of output kept; a file of more than 16 MiB does not come back either


def append(path: Path, line: dict) -> None:
    """One JSON line, on the disk when this returns; lines of several processes do not mix."""
    text = (json.dumps(line) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, text)
        os.fsync(file)
    finally:
        os.close(file)


def lines_of(path: Path) -> tuple[list[dict], int]:
    """The lines of a file, and how many of them are torn: whoever wrote them may have been killed while writing."""
    found, torn = [], 0
    if not path.exists():
        return found, torn
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            torn += 1
            continue
        if isinstance(line, dict):
            found.append(line)
        else:
            torn += 1
    return found, torn


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def _pieces(out: Path) -> list[str]:
    ended = [line for line in lines_of(out / PIECES)[0] if line.get("event") == "end"]
    rows = [
        [line["piece"], line["status"], f"{line['seconds']:.0f} s", line.get("reason", "")] for line in ended
    ]
    return _aligned(rows)


def _tests(out: Path) -> list[str]:
    outcomes: dict[str, dict] = {line["test"]: line for line in lines_of(out / TESTS)[0]}
    counts: dict[str, int] = {}
    for line in outcomes.values():
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    lines = [
        "tests: "
        + (", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none ran")
    ]
    failed = [line for line in outcomes.values() if line["outcome"] in ("failed", "error")]
    return lines + [f"  {line['test']}: {line.get('reason', '')}" for line in failed]


def _rows(out: Path) -> list[str]:
    cases, torn = lines_of(out / ROWS)
    columns = ["baseline", "median_ms", "baseline_ms", "ratio", "share_of_peak"]
    # A case measured again, in a second try, stands once, as it came out last.
    timed = {(case["op"], case["case"]): case["rows"] for case in cases if "rows" in case}
    rows = [
        [op, case, *(_number(row.get(column)) for column in columns)]
        for (op, case), found in timed.items()
        for row in found
    ]
    failed = {(case["op"], case["case"]): case["error"] for case in cases if "error" in case}
    lines = _aligned([["op", "case", *columns], *rows]) if rows else ["no case was timed"]
    lines += [
        f"not timed: {op} {case}: {error}" for (op, case), error in failed.items() if (op, case) not in timed
    ]
    return lines + ([f"{torn} torn lines in {ROWS}"] if torn else [])


def _measures(out: Path) -> list[str]:
    return [
        "  ".join(f"{name} {_number(value)}" for name, value in line.items())
        for line in lines_of(out / MEASURES)[0]
    ]


def table(out: Path) -> str:
    """Everything in ``out`` as a short text: the pieces, the tests that failed, the cases, the other measurements."""
    parts = [_pieces(out), _tests(out), _rows(out), _measures(out)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"
