"""Figures draw the failures they are for: what is None, zero or not finite is seen, and nothing else is lost."""

import math
from xml.etree import ElementTree

import pytest

from gaugekit.pages import figures, numbers
from gaugekit.pages.charts import Bar, Series, bars, lines

NAN, INF = float("nan"), float("inf")


def parsed(drawing):
    """The parts of a drawing; no number of it may be NaN or infinite."""
    assert "nan" not in drawing and "inf" not in drawing.replace("not finite", "")
    root = ElementTree.fromstring(drawing)
    for legend in root.findall("g[@class='legend']"):
        root.remove(legend)
    paths = [path.get("d") for path in root.iter("path") if "line" in path.get("class", "")]
    crosses = [group for group in root.iter("g") if group.get("class") == "missing"]
    return root, paths, crosses, list(root.iter("circle"))


def layers(noise, error):
    rows = [{"noise": n, "relative_error": e} for n, e in zip(noise, error, strict=True)]
    return {"fp32": {"layers": rows}}


@pytest.mark.parametrize("bad", [None, NAN, INF])
def test_a_layer_that_is_not_finite_breaks_the_line_and_has_a_cross(bad):
    drawing = figures.error_by_layer(layers([1e-7, 2e-7, 3e-7, 4e-7], [1e-7, bad, 3e-7, bad]), "fp32")
    root, paths, crosses, dots = parsed(drawing)
    assert [path.count(",") for path in paths] == [4, 1, 1] and len(crosses) == 2 and len(dots) == 6
    assert "converted not finite" in root.find("desc").text
    root, paths, crosses, dots = parsed(figures.error_by_layer(layers([bad] * 3, [bad] * 3), "fp32"))
    assert paths == dots == [] and len(crosses) == 6


def test_a_model_without_any_error_is_drawn_at_zero():
    _, paths, crosses, dots = parsed(figures.error_by_layer(layers([0.0, 0.0], [0.0, 0.0]), "fp32"))
    assert len(paths) == 2 and crosses == [] and len({dot.get("cy") for dot in dots}) == 1


def test_a_dead_head_is_a_line_at_zero_and_a_dead_layer_is_drawn_too():
    row = {"layer": 0, "singular_values": [[4.0, 2.0, 1.0], [0.0, 0.0, 0.0]], "kept": [2, 1]}
    root, paths, _, dots = parsed(figures.spectrum(row))
    assert len(paths) == 5 and len(dots) == 2 and "1 of them dead" in root.find("desc").text
    heights = {point.split(",")[1] for point in paths[1].lstrip("M").split("L")}
    assert len(heights) == 1 and heights == {dots[1].get("cy")}
    root, paths, _, _ = parsed(figures.spectrum({"layer": 0, "singular_values": [[0.0, 0.0]] * 3}))
    assert len(paths) == 4 and "3 of them dead" in root.find("desc").text


def test_smoothing_keeps_the_layers_that_were_measured():
    rows = [
        {"token_cosine": 0.2, "energy": None},
        {"token_cosine": None, "energy": None},
        {"token_cosine": 0.4},
    ]
    root, _, crosses, dots = parsed(figures.smoothing({"layers": rows}))
    assert len(dots) == 2 and len(crosses) == 1 and "layer 2: no cosine" in root.find("desc").text
    assert figures.smoothing({"layers": [{"token_cosine": None, "energy": None}]}) == ""
    flat = figures.smoothing({"layers": [{"token_cosine": 0.0, "energy": 0.0}] * 2})
    assert len(parsed(flat)[1]) == 2


def test_charts_take_values_that_are_missing():
    _, paths, crosses, _ = parsed(
        lines([Series([1.0, None, 2.0], "ours")], title="t", desc="d", x_label="x", y_label="y", x_ticks=[],
              y_range=(0, 2))
    )  # fmt: skip
    assert len(paths) == 2 and len(crosses) == 1
    drawing = bars(
        [Bar("a", None, "ours", "not finite"), Bar("b", 2.0, "ours", "2")], title="t", desc="d", x_label="x"
    )
    root, _, crosses, _ = parsed(drawing)
    assert len(crosses) == 1 and len(list(root.iter("rect"))) == 1


@pytest.mark.parametrize(
    ("noise", "error", "said"),
    [
        (2e-7, 3e-7, "1.50 ×"), (None, 3e-7, "not finite"), (2e-7, None, "not finite"), (2e-7, NAN, "not finite"),
        (0.0, 0.0, "no error"), (0.0, 1e-9, "error beside no noise"),
    ],
)  # fmt: skip
def test_ratios_say_what_they_cannot(noise, error, said):
    assert numbers.over_noise({"noise": noise, "relative_error": error}) == said


def test_small_numbers_and_cosines_say_what_they_cannot():
    assert [numbers.power_of_ten(value) for value in (None, NAN, INF, 0, 2.7e-7)] == [
        "not finite", "not finite", "not finite", "0", "2.7 · 10⁻⁷",
    ]  # fmt: skip
    assert numbers.cosine(math.nan) == numbers.cosine(None) == "not finite"
