"""The charts: marks stand where the data says, ticks are round, every drawing names itself."""

import re
from xml.etree import ElementTree

import pytest

from gaugekit.pages.charts import Bar, Series, bars, columns, key, lines, nice, superscript

WORDS = dict(title="a <title>", desc="a & description", x_label="x < 1", y_label="y")


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def parse(drawing):
    root = ElementTree.fromstring(drawing)
    title, desc = root.find("title"), root.find("desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}" and root.get("role") == "img"
    assert title.text == WORDS["title"] and desc.text == WORDS["desc"]
    return root


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 33, [0, 10, 20, 30]),
        (0, 2.6, [0, 1, 2]),
        (3, 3, [3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert nice(low, high) == expected


def test_superscript():
    assert superscript(-27) == "⁻²⁷" and superscript(0) == "⁰"


def test_a_line_goes_through_its_points():
    """Equal steps of the data are equal steps on paper, upwards for more, and a mark stands on every point."""
    series = [Series([0, 1, 3], "ours", marks=True)]
    root = parse(lines(series, x_ticks=[(0, "first")], y_range=(0, 3), **WORDS))
    path = numbers(root.find("path").get("d"))
    x, y = path[0::2], path[1::2]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)  # coordinates carry one decimal
    assert (y[0] - y[2]) == pytest.approx(3 * (y[0] - y[1]), abs=0.3)
    marks = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in root.findall("circle")]
    assert marks == list(zip(x, y, strict=True))
    assert "first" in [text.text for text in root.iter("text")]


def test_columns_are_as_high_as_their_numbers():
    root = parse(columns([10, 20, 0], x_ticks=[], **WORDS))
    heights = [float(rect.get("height")) for rect in root.findall("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[2] == 0
    bottoms = [float(rect.get("y")) + float(rect.get("height")) for rect in root.findall("rect")]
    assert max(bottoms) - min(bottoms) < 0.11


def test_bars_are_as_long_as_their_numbers_and_carry_them():
    words = {name: WORDS[name] for name in ("title", "desc", "x_label")}
    rows = [Bar("a", 4.0, "ours", "4 MB", "first"), Bar("b <", 1.0, "other", "1 MB", "second")]
    root = parse(bars(rows, **words))
    long, short = (float(rect.get("width")) for rect in root.findall("rect"))
    assert long == pytest.approx(4 * short, abs=0.3)
    texts = [text.text for text in root.iter("text")]
    assert texts == ["first", "a", "4 MB", "second", "b <", "1 MB", "x < 1"]
    inside = [float(text.get("y")) for text in root.iter("text")]
    assert max(inside) <= float(root.get("viewBox").split()[3])


def test_ids_are_unique_on_a_page():
    drawings = [parse(columns([1], x_ticks=[], **WORDS)) for _ in range(2)]
    assert len({drawing.find("title").get("id") for drawing in drawings}) == 2


def test_a_legend_stands_inside_the_drawing_and_above_the_plot():
    series = [
        Series([0, 1], "noise", label="a long name <of a line>"),
        Series([1, 0], "ours", label="another", marks=True),
    ]
    root = parse(lines(series, x_ticks=[], y_range=(0, 1), **WORDS))
    labels = {
        text.text: text for text in root.iter("text") if text.text in ("a long name <of a line>", "another")
    }
    assert len(labels) == 2
    width, top = (
        float(root.get("viewBox").split()[2]),
        min(float(line.get("y1")) for line in root.findall("line")),
    )
    for words, text in labels.items():
        assert float(text.get("x")) + 7 * len(words) < width and float(text.get("y")) < top
    legend = root.find("g[@class='legend']")
    assert [path.get("class") for path in legend.findall("path")] == ["line noise", "line ours"]
    assert len(legend.findall("circle")) == 1


def test_a_legend_that_is_too_long_takes_a_second_row():
    drawing = ElementTree.fromstring(
        key([("one of the heads", "head", "line"), ("the median", "ours", "dot")], width=200)
    )
    rows = [float(text.get("y")) for text in drawing.iter("text")]
    assert rows[1] > rows[0] and rows[1] <= float(drawing.get("viewBox").split()[3])
    assert len(list(drawing.iter("circle"))) == 1 and len(list(drawing.iter("path"))) == 1
