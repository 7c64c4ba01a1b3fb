"""Three charts as inline SVG, drawn from data: lines, columns, horizontal bars.

Every function returns one ``<svg>`` string with a title and a description for screen readers and no style of
its own: colours and type come from the page, through the classes ``grid``, ``axis``, ``tick``, ``label``,
``value``, ``heading`` and the ``kind`` a caller gives each series (``line <kind>``, ``mark <kind>``,
``bar <kind>``). Sizes are in the pixels of the drawing; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, groupby

Ticks = Sequence[tuple[float, str]]
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 42  # room around the plotting area; the left holds numbers and a label

_identifiers = count(1)


@dataclass
class Series:
    """One line: ``y`` at ``x``, or at 0, 1, 2, …; ``kind`` is its CSS class, ``marks`` adds a dot a point.

    Where ``y`` is None, NaN or infinite the line is broken, and a cross stands on the axis.
    """

    y: Sequence[float | None]
    kind: str
    x: Sequence[float] | None = None
    marks: bool = False


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
) -> str:
    """A line chart; ``inset`` keeps so many x units free at both sides."""
    width, height = size
    top, bottom = TOP + (16 if heading else 0), height - BOTTOM
    xs = [value for one in series for value in _places(one)]
    to_x = _scale(min(xs) - inset, max(xs) + inset, LEFT, width - RIGHT)
    to_y = _scale(*y_range, bottom, top)
    y_ticks = [(value, f"{value:g}") for value in nice(*y_range)]
    body = [_axes(size, top, to_x, to_y, x_ticks, y_ticks, x_label, y_label)]
    if heading:
        body.append(_text(LEFT, 16, heading, "heading"))
    for one in series:
        points = list(zip(_places(one), one.y, strict=True))
        pairs = [(to_x(x), to_y(y)) for x, y in points if is_number(y)]
        for there, run in groupby(points, key=lambda point: is_number(point[1])):
            if there:
                path = "L".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in run)
                body.append(f'<path class="line {one.kind}" d="M{path}"/>')
            else:
                body += [_cross(to_x(x), bottom) for x, _ in run]
        if one.marks:
            body += [f'<circle class="mark {one.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in pairs]
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
) -> str:
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
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{breadth:.1f}" height="{bottom - y:.1f}"'
        body.append(f'<rect class="bar ours" {shape}/>')
    return _svg(size, title, desc, body)


def bars(
    rows: Sequence[Bar], *, title: str, desc: str, x_label: str, width: int = 440, room: int = 84
) -> str:
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
            shape = f'x="0" y="{y + 19}" width="{max(end, 1):.1f}" height="14" rx="2"'
            body.append(f'<rect class="bar {row.kind}" {shape}/>')
        else:
            body.append(_cross(4, y + 26))
        body.append(_text(end + 8, y + 30.5, row.text, "value"))
        y += 42
    body.append(_text(0, y + 16, x_label, "tick"))
    return _svg((width, y + 24), title, desc, body)


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


def _cross(x: float, y: float) -> str:
    """Says that a value is missing where it should stand."""
    strokes = (
        f"M{x - 4:.1f},{y - 4:.1f}L{x + 4:.1f},{y + 4:.1f}M{x - 4:.1f},{y + 4:.1f}L{x + 4:.1f},{y - 4:.1f}"
    )
    return f'<g class="missing"><title>not finite, or not measured</title><path d="{strokes}"/></g>'


def _places(one: Series) -> Sequence[float]:
    return range(len(one.y)) if one.x is None else one.x


def _axes(size, top, to_x, to_y, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str) -> str:
    right, bottom = size[0] - RIGHT, size[1] - BOTTOM
    parts = []
    for value, text in y_ticks:
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 7, y + 4, text, "tick end"))
    parts += [_text(to_x(value), bottom + 17, text, "tick middle") for value, text in x_ticks]
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(_text((LEFT + right) / 2, bottom + 36, x_label, "label middle"))
    turned = f'transform="translate(12 {(top + bottom) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text class="label middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(size: tuple[int, int], title: str, desc: str, body: Sequence[str]) -> str:
    # ids must be unique on the page that several charts share
    name = f"chart{next(_identifiers)}"
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(desc)}</desc>'
        f"{''.join(body)}</svg>"
    )
