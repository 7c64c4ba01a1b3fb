"""Three charts as inline SVG, drawn from data: lines, columns, horizontal bars.

Every function returns one ``<svg>`` with a title and a description for screen readers and no style of
its own: colours and type come from the page, through the classes ``grid``, ``axis``, ``tick``, ``label``,
``value``, ``heading`` and the ``kind`` a caller gives each series (``line <kind>``, ``mark <kind>``,
``bar <kind>``). Sizes are in the pixels of the drawing; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from gaugekit.pages.markup import Html, html, joined

Ticks = Sequence[tuple[float, str]]
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 42  # room around the plotting area; the left holds numbers and a label
LETTER = 7.0  # pixels a letter of a legend takes at most

_identifiers = count(1)


@dataclass
class Series:
    """One line: ``y`` at ``x``, or at 0, 1, 2, …; ``kind`` is its CSS class, ``marks`` adds a dot a point.

    Where ``y`` is None, NaN or infinite the line is broken, and a cross stands on the axis. ``label`` names it in the
    chart's legend.
    """

    y: Sequence[float | None]
    kind: str
    x: Sequence[float] | None = None
    marks: bool = False
    label: str = ""


@dataclass
class Bar:
    """One horizontal bar: its name, its length, its CSS class, the text at its end, the group it belongs to.

    A ``value`` that is None, NaN or infinite has no bar but a cross.
    """

    label: str
    value: float | None
    kind: str
    text: str
    group: str = ""


def lines(
    series: Sequence[Series],
    *,
    title: str,
    desc: str,
    x_label: str,
    y_label: str,
    x_ticks: Ticks,
    y_range: tuple[float, float],
    size: tuple[int, int] = (440, 270),
    inset: float = 0.0,
    heading: str = "",
) -> Html:
    """A line chart; ``inset`` keeps so many x units free at both sides. Series with a label have a legend on top."""
    width, height = size
    labelled = [(line.label, line.kind, "both" if line.marks else "line") for line in series if line.label]
    legend = _legend(labelled, LEFT, 12, width - RIGHT) if labelled else ([], 0)
    top, bottom = TOP + (16 if heading else 0) + legend[1], height - BOTTOM
    xs = [value for line in series for value in _places(line)]
    to_x = _scale(min(xs) - inset, max(xs) + inset, LEFT, width - RIGHT)
    to_y = _scale(*y_range, bottom, top)
    y_ticks = [(value, f"{value:g}") for value in nice(*y_range)]
    body = [_axes(size, top, to_x, to_y, x_ticks, y_ticks, x_label, y_label)]
    body += legend[0]
    if heading:
        body.append(_text(LEFT, 16, heading, "heading"))
    for line in series:
        points = list(zip(_places(line), line.y, strict=True))
        pairs = [(to_x(x), to_y(y)) for x, y in points if is_number(y)]
        for there, run in groupby(points, key=lambda point: is_number(point[1])):
            if there:
                path = "L".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in run)
                body.append(html('<path class="line {kind}" d="M{path}"/>', kind=line.kind, path=path))
            else:
                body += [_cross(to_x(x), bottom) for x, _ in run]
        if line.marks:
            body += [_dot(x, y, line.kind) for x, y in pairs]
    return _svg(size, title, desc, body)


def columns(
    heights: Sequence[float],
    *,
    title: str,
    desc: str,
    x_label: str,
    y_label: str,
    x_ticks: Ticks,
    size: tuple[int, int] = (440, 270),
) -> Html:
    """A histogram: one column at each of 0, 1, 2, …"""
    width, height = size
    bottom = height - BOTTOM
    to_x = _scale(-0.5, len(heights) - 0.5, LEFT, width - RIGHT)
    to_y = _scale(0, max(heights), bottom, TOP)
    y_ticks = [(value, f"{value:g}") for value in nice(0, max(heights))]
    body = [_axes(size, TOP, to_x, to_y, x_ticks, y_ticks, x_label, y_label)]
    breadth = 0.82 * (to_x(1) - to_x(0))
    for place, value in enumerate(heights):
        x, y = to_x(place) - breadth / 2, to_y(value)
        body.append(_rect("ours", x, y, breadth, bottom - y))
    return _svg(size, title, desc, body)


def bars(
    rows: Sequence[Bar], *, title: str, desc: str, x_label: str, width: int = 440, room: int = 84
) -> Html:
    """Horizontal bars from zero, each with its name above it and, in the ``room`` at its right, its number.

    A ``group`` stands as a heading above the first of its rows.
    """
    longest = max((row.value for row in rows if is_number(row.value)), default=0.0) or 1.0
    to_x = _scale(0, longest, 0, width - room)
    body, y, group = [], 0, ""
    for row in rows:
        if row.group != group:
            group = row.group
            y += 12 if y else 0
            body.append(_text(0, y + 14, group, "heading"))
            y += 24
        body.append(_text(0, y + 13, row.label, "label"))
        end = to_x(row.value) if is_number(row.value) else 8.0
        if is_number(row.value):
            body.append(_rect(row.kind, 0, y + 19, max(end, 1), 14, rounded=True))
        else:
            body.append(_cross(4, y + 26))
        body.append(_text(end + 8, y + 30.5, row.text, "value"))
        y += 42
    body.append(_text(0, y + 16, x_label, "tick"))
    return _svg((width, y + 24), title, desc, body)


def key(entries: Sequence[tuple[str, str, str]], *, width: int = 440) -> Html:
    """A legend by itself, for several charts of one figure: (label, CSS class, "line", "dot" or "both") each."""
    body, height = _legend(entries, 0, 12, width)
    return _svg((width, height), "Legend", "; ".join(label for label, _, _ in entries), body)


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round tick values from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten, some ``about`` many."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= span * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def is_number(value: float | None) -> bool:
    """Whether a value can be drawn: it is there and finite."""
    return value is not None and math.isfinite(value)


def superscript(value: int) -> str:
    """An exponent as raised digits: −7 gives ⁻⁷."""
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _legend(
    entries: Sequence[tuple[str, str, str]], left: float, y: float, right: float
) -> tuple[list[Html], int]:
    """(the legend's marks and words from ``left`` on, a new row where ``right`` is passed; its height)."""
    body, x, first = [], left, y
    for label, kind, mark in entries:
        wide = 30 + LETTER * len(label)
        if x > left and x + wide > right:
            x, y = left, y + 18
        if mark != "dot":
            body.append(html('<path class="line {kind}" d="M{x:.1f},{y:.1f}h22"/>', kind=kind, x=x, y=y - 4))
        if mark != "line":
            body.append(_dot(x + 11, y - 4, kind))
        body.append(_text(x + 28, y, label, "label"))
        x += wide + 14
    return [html('<g class="legend">{marks}</g>', marks=joined(body))], round(y - first) + 20


def _cross(x: float, y: float) -> Html:
    """Says that a value is missing where it should stand."""
    return html(
        '<g class="missing"><title>not finite, or not measured</title>'
        '<path d="M{a:.1f},{c:.1f}L{b:.1f},{d:.1f}M{a:.1f},{d:.1f}L{b:.1f},{c:.1f}"/></g>',
        a=x - 4,
        b=x + 4,
        c=y - 4,
        d=y + 4,
    )


def _dot(x: float, y: float, kind: str) -> Html:
    return html('<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>', kind=kind, x=x, y=y)


def _rect(kind: str, x: float, y: float, width: float, height: float, rounded: bool = False) -> Html:
    return html(
        '<rect class="bar {kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{corner}/>',
        kind=kind,
        x=x,
        y=y,
        width=width,
        height=height,
        corner=Html(' rx="2"' if rounded else ""),
    )


def _places(line: Series) -> Sequence[float]:
    return range(len(line.y)) if line.x is None else line.x


def _axes(size, top, to_x, to_y, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str) -> Html:
    right, bottom = size[0] - RIGHT, size[1] - BOTTOM
    parts = []
    for value, text in y_ticks:
        y = to_y(value)
        parts.append(_rule("grid", right, y))
        parts.append(_text(LEFT - 7, y + 4, text, "tick end"))
    parts += [_text(to_x(value), bottom + 17, text, "tick middle") for value, text in x_ticks]
    parts.append(_rule("axis", right, bottom))
    parts.append(_text((LEFT + right) / 2, bottom + 36, x_label, "label middle"))
    parts.append(
        html(
            '<text class="label middle" transform="translate(12 {middle:.1f}) rotate(-90)">{label}</text>',
            middle=(top + bottom) / 2,
            label=y_label,
        )
    )
    return joined(parts)


def _rule(kind: str, right: float, y: float) -> Html:
    return html(
        '<line class="{kind}" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>',
        kind=kind,
        left=LEFT,
        right=right,
        y=y,
    )


def _text(x: float, y: float, text: str, kind: str) -> Html:
    return html('<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>', kind=kind, x=x, y=y, text=text)


def _svg(size: tuple[int, int], title: str, desc: str, body: Sequence[Html]) -> Html:
    return html(
        '<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        '<title id="{name}-title">{title}</title><desc id="{name}-desc">{desc}</desc>{body}</svg>',
        name=f"chart{next(_identifiers)}",  # ids must be unique on the page that several charts share
        width=size[0],
        height=size[1],
        title=title,
        desc=desc,
        body=joined(body),
    )
