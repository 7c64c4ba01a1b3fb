"""The one thing every verb returns: named results that dump as JSON, and their text, which is made here alone."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

UNITS = ("kB", "MB", "GB", "TB")


@dataclass
class Report:
    """What a verb did or found.

    ``verb``: its name.
    ``fields``: the results (JSON values only, units at the end of the names); ``report["total"]`` reads one.
    ``notes``: sentences for the reader: what was left alone and why.

    The text that ``print(report)`` shows is made of ``notes`` and these:

    ``lines``: (what a figure is, the figure, its limit or meaning beside it).
    ``tables``: {heading: one line for each layer or step}.
    ``done``: one sentence: what was done, what was written and where.
    ``next``: the command or call that follows naturally.
    """

    verb: str
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    done: str = ""
    next: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def json(self) -> str:
        """The fields as one JSON object, as ``--json`` prints it."""
        return json.dumps(self.fields, allow_nan=False)

    def __str__(self) -> str:
        blocks = [[self.verb, *table(self.lines)]]
        blocks += [[heading, *(f"  {row}" for row in rows)] for heading, rows in self.tables.items() if rows]
        ending = [*([self.done] if self.done else []), *([f"next: {self.next}"] if self.next else [])]
        return "\n\n".join("\n".join(block) for block in (*blocks, self.notes, ending) if block)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of two columns, the second flush left."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def spread(values: Iterable[float]) -> str:
    """Where numbers lie: "3 to 8", or "8" where all are the same."""
    values = list(values)
    low, high = (figure(end(values)) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def figure(value: float) -> str:
    """A number in few digits: 1,234,567, 0.0123, 3.1e-07."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def size(count: float) -> str:
    """A number of bytes as people read it: 90.9 MB."""
    if count < 1000:
        return f"{count:,} bytes"
    power = min(len(UNITS), (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.1f} {UNITS[power - 1]}"


def change(before: float, after: float) -> str:
    """How much smaller or larger: "34.1 % smaller"."""
    if not before or before == after:
        return "as large as before"
    share = 100 * abs(1 - after / before)
    return f"{share:.1f} % {'smaller' if after < before else 'larger'}"


def shell(path: str | os.PathLike) -> str:
    """A path as a command line takes it."""
    return shlex.quote(os.fspath(path))
