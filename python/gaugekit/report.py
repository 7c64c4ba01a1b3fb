"""The one thing every verb returns: named results that print as a table and dump as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What a verb did or found.

    ``verb`` is the verb's name, ``fields`` its results (JSON values only, units at the end of the names), ``notes``
    sentences for the reader: what was left alone and why. ``report["total"]`` reads a field.
    """

    verb: str
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def json(self) -> str:
        """The fields as one JSON object, as ``--json`` prints it."""
        return json.dumps(self.fields, allow_nan=False)

    def __str__(self) -> str:
        width = max((len(name) for name in self.fields), default=0)
        lines = [self.verb]
        for name, value in self.fields.items():
            lines.append(f"  {name:<{width}}  {_cell(value)}")
        return "\n".join([*lines, *self.notes])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"{len(value)} entries"
    return str(value)
