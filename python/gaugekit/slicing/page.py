"""The page that ``gaugekit convert --slice`` leaves: what each junction kept, what each form of the rotations costs."""

from __future__ import annotations

import math

from gaugekit.pages.charts import Bar, Series, bars, lines
from gaugekit.pages.document import document, figure, section, table
from gaugekit.pages.markup import Html, html
from gaugekit.report import size

NAME = "report.html"
WHAT = {
    "dense": "as published: a square matrix a junction",
    "triangular": "the basis turned until that matrix is triangular; its zeros are not stored",
    "polar": "the basis turned until it is I − Y Yᵀ with a narrow Y",
    "bits-back": "dense, in a file whose rotations hide bits of it",
}


def pages(certificate: dict) -> dict[str, str]:
    """{"report.html": the page} of a slicing's certificate."""
    steps = {step["rewrite"]: step for step in certificate["steps"]}
    step, coded = steps["slice"], steps.get("bits-back")
    before, after = (certificate[f"parameters_{when}"] for when in ("before", "after"))
    header = html(
        """<h1>A narrower residual stream</h1>
<p class="lead">Every block now reads and writes <strong>{width:,} directions</strong>, about {fraction:.0%} fewer,
which hold {kept:.2%} of the stream’s energy on the calibration text, in the mean. {before:,} parameters became
{after:,}. This is <strong>approximate</strong>: <code>gaugekit verify --perplexity</code> says what it cost,
<code>gaugekit heal</code> wins some of it back.</p>""",
        width=step["width"],
        fraction=step["fraction"],
        kept=step["kept"],
        before=before,
        after=after,
    )
    body = [_energy(certificate["layers"]), _forms(step, coded)]
    if "trials" in step:
        body.append(_trials(step))
    if coded is not None:
        body.append(_groups(coded))
    return {NAME: document("slicing", header, *body)}


def _energy(layers: list[dict]) -> Html:
    shares = [share for row in layers for share in row["kept"]]
    drawing = lines(
        [Series([100 * (1 - share) for share in shares], "ours", marks=len(shares) < 80)],
        title="Energy cut at each junction",
        desc=f"from {min(shares):.3%} to {max(shares):.3%} kept",
        x_label="junction",
        y_label="% of the energy",
        x_ticks=[(0, "1"), (len(shares) - 1, str(len(shares)))],
        y_range=(0, max(1e-9, 108 * (1 - min(shares)))),
    )
    caption = (
        "The share of Σ‖x‖² that lies in no kept direction, on the calibration text, junction by junction."
    )
    return section("What was cut", figure("Energy cut at each junction", drawing, caption))


def _forms(step: dict, coded: dict | None) -> Html:
    sizes = {name: form["bytes"] for name, form in step["forms"].items()}
    chosen = step["form"] if coded is None else "bits-back"
    if coded is not None:
        sizes["bits-back"] = coded["bytes"]
    rows = [
        Bar(name, value, "ours" if name == chosen else "plain", size(value)) for name, value in sizes.items()
    ]
    drawing = bars(rows, title="Weights in each form", desc=", ".join(f"{bar.label} {bar.text}" for bar in rows),
                   x_label="bytes; all are the same function")  # fmt: skip
    cells = []
    for name, value in sizes.items():
        products = step["forms"].get(name, step["forms"]["dense"])["multiply_adds"]
        stored = ", matrices as int8" if name == "bits-back" and step.get("quantize") else ""
        cells.append([name, WHAT[name] + stored, size(value), f"{products:,}"])
    head = ["Form", "How shortcuts are stored", "Weights", "Multiply-adds a token past the layers"]
    count = f"{step['permutation_bits']:,.0f} bits"
    note = html(
        "<p>Not used: the order of neurons and heads, unseen as well, is worth {count}.</p>",
        count=count,
    )
    return section("The forms of the rotations", figure("Weights in each form", drawing, f"Written here: {chosen}."),
                   table(head, cells, "23"), note)  # fmt: skip


def _trials(step: dict) -> Html:
    rows = [
        [f"{row['drop']:g}" + (", taken" if row["drop"] == step["drop"] else ""), f"{row['rank']:.1f}",
         f"{row['loss']:.4f}", f"{math.exp(row['loss']):.3f}"]
        for row in step["trials"]
    ]  # fmt: skip
    head = ["Columns go below", "Columns left a shortcut, in the mean", "Loss, nats a token", "Perplexity"]
    return section("The columns of Y that were dropped, by text that was held out", table(head, rows, "123"))


def _groups(coded: dict) -> Html:
    rows = [
        [str(number), f"{group['dimension']:,}", f"{group['degrees_of_freedom']:,}", f"{group['nominal_bits']:,}",
         f"{_realised(group):,.0f}", f"{_realised(group) / max(1, group['degrees_of_freedom']):.2f}"]
        for number, group in enumerate(coded["groups"], 1)
    ]  # fmt: skip
    total = [coded[name] for name in ("degrees_of_freedom", "nominal_bits", "realised_bits")]
    mean = f"{total[2] / max(1, total[0]):.2f}"
    rows.append(["all", "", f"{total[0]:,}", f"{total[1]:,}", f"{total[2]:,.0f}", mean])
    head = ["Rotation", "Width", "Degrees of freedom", "Ideal bits", "Bits given back", "A degree of freedom"]
    return section("What the rotations gave back", table(head, rows, "12345", total=True))


def _realised(group: dict) -> float:
    return group["popped_bits"] - group["corrections_bits"] - group["pivots_bits"]
