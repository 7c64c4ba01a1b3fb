"""The page that ``gaugekit convert --rank | --energy | --min-cosine`` leaves: what each head needed, what it kept."""

from __future__ import annotations

from statistics import fmean

from gaugekit.pages import figures
from gaugekit.pages.document import document, figure, section, table
from gaugekit.pages.markup import Html, html
from gaugekit.pages.numbers import span


def pages(certificate: dict) -> dict[str, str]:
    """{"report.html": the page}, for ``gaugekit.convert(..., pages=pages)``; {} where nothing was truncated."""
    steps = {step["rewrite"]: step for step in certificate["steps"]}
    if "rank" not in steps:
        return {}
    layers, aware = certificate["layers"], steps["rank"]["aware"]
    before, after = (certificate[f"parameters_{when}"] for when in ("before", "after"))
    ranks = [rank for row in layers for rank in row["ranks"]]
    width = len(layers[0]["singular_values"][0])
    header = html(
        """<h1>How many channels the scores need</h1>
<p class="lead">A head compares two tokens through W<sub>Q</sub>W<sub>K</sub>ᵀ alone. Of {width} query and key
channels a head, <strong>{mean:.1f} on average</strong> were kept, and {removed:,} of {before:,}
parameters ({share:.2%}) are no longer stored. Unlike gauge fixing this is
<strong>approximate</strong>: <code>gaugekit verify</code> says what it cost, <code>gaugekit heal</code> wins some of it
back.</p>""",
        width=width,
        mean=fmean(ranks),
        removed=before - after,
        before=before,
        share=(before - after) / before,
    )
    return {
        "report.html": document("rank of the scores", header, _spectra(layers, aware), _kept(layers, width))
    }


def _spectra(layers: list[dict], aware: bool) -> Html:
    seen = (
        "as the activations of the calibration text feel them: their squares add up to the mean squared score."
        if aware
        else "of the weights alone: no calibration text was given, so directions that no input takes count in full."
    )
    return section(
        "What each head needs",
        figure(
            Html("Singular values of W<sub>Q</sub>W<sub>K</sub>ᵀ"),
            figures.spectra([{**row, "kept": row["ranks"]} for row in layers]),
            f"One line a key head, {seen} Relative to the head’s largest (no unit). What lies to the right of the "
            f"dot is gone. Of rotary channels a pair counts as two equal ones.",
        ),
    )


def _kept(layers: list[dict], width: int) -> Html:
    rows = []
    for row in layers:
        rows.append([
            str(row["layer"] + 1),
            span(row["ranks"]),
            f"{fmean(row['ranks']):.1f}",
            f"{fmean(row['energy_kept']):.2%}",
            f"{min(row['energy_kept']):.2%}",
        ])  # fmt: skip
    head = ["Layer", f"Channels kept, of {width}", "Mean", "Energy kept, mean", "Energy kept, least"]
    note = Html("<p>Energy: the share of a head’s squared singular values that stayed.</p>")
    return section("What was kept", note, table(head, rows, "1234"))
