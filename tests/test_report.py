"""How a report reads: figures, tables, notes, what was done, what comes next; and how numbers are written."""

import ast
import json
from pathlib import Path

import pytest

import gaugekit as gk
from gaugekit.report import Report, change, figure, shell, size, spread


def test_the_text_has_its_parts_in_order():
    report = Report("verb", {"total": 3, "rows": [1]}, ["A note."])
    report.lines = [("total", "3 numbers"), ("a longer name", "4, limit 5")]
    report.tables = {"layers": ["layer 0: 1", "layer 1: 2"], "empty": []}
    report.done, report.next = "Did it; nothing was written.", "gaugekit doctor"
    assert str(report).splitlines() == [
        "verb",
        "  total          3 numbers",
        "  a longer name  4, limit 5",
        "",
        "layers",
        "  layer 0: 1",
        "  layer 1: 2",
        "",
        "A note.",
        "",
        "Did it; nothing was written.",
        "next: gaugekit doctor",
    ]
    assert json.loads(report.json()) == {"total": 3, "rows": [1]} and report["total"] == 3


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (spread([3, 8, 5]), "3 to 8"),
        (spread([8, 8]), "8"),
        (spread([0.12345, 2.0]), "0.123 to 2"),
        (figure(1234567), "1,234,567"),
        (figure(3.14e-7), "3.14e-07"),
        (size(999), "999 bytes"),
        (size(1000), "1.0 kB"),
        (size(90_868_376), "90.9 MB"),
        (size(999_999_999), "1000.0 MB"),
        (size(3_400_000_000_000_000), "3400.0 TB"),
        (change(200, 150), "25.0 % smaller"),
        (change(100, 101), "1.0 % larger"),
        (change(5, 5), "as large as before"),
        (shell("a b"), "'a b'"),
    ],
)
def test_numbers_are_written_for_people(shown, expected):
    assert shown == expected


def test_every_report_says_what_was_done_and_what_comes_next():
    """Wherever the package makes a Report, that function or the one it hands the report to sets both."""
    makers = []
    for path in Path(gk.__file__).parent.rglob("*.py"):
        source = path.read_text()
        calls = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Report"
        ]
        # the demo has a text of its own; the engine's, shared or not, the directory job's and a packing's are told
        # by who calls them
        if (
            calls
            and path.parent.name not in ("demo", "directories")
            and path.name not in ("engine.py", "sharing.py", "chain.py")
        ):
            makers.append(path)
            told = "wording." in source or (".done = " in source and ".next = " in source)
            assert told, f"{path}: its reports end without a sentence"
    assert len(makers) >= 8
