"""The page that ``gaugekit convert --rank | --energy | --min-cosine`` leaves: what each head needed, what it kept."""

from __future__ import annotations

from html import escape
from statistics import fmean

from gaugekit.pages import figures
from gaugekit.pages.document import document, figure, section, table


def pages(certificate: dict) -> dict[str, str]:
    """{"report.html": the page}, for ``gaugekit.convert(..., pages=pages)``; {} where nothing was truncated."""
    steps = {step["rewrite"]: step for step in certificate["steps"]}
    if "rank" not in steps:
        return {}
    layers, aware = certificate["layers"], steps["rank"]["aware"]
    before, after = (certificate[f"parameters_{when}"] for when in ("before", "after"))
    ranks = [rank for row in layers for rank in row["ranks"]]
    width = len(layers[0]["singular_values"][0])
    header = f"""<h1>How many channels the scores need</h1>
<p class="lead">A head compares two tokens through W<sub>Q</sub>W<sub>K</sub>ᵀ alone. Of {width} query and key
channels a head, <strong>{fmean(ranks):.1f} on average</strong> were kept, and {before - after:,} of {before:,}
parameters ({(before - after) / before:.2%}) are no longer stored. Unlike gauge fixing this is
<strong>approximate</strong>: <code>gaugekit verify</code> says what it cost, <code>gaugekit heal</code> wins some of it
back.</p>"""
    return {
        "report.html": document("rank of the scores", header, _spectra(layers, aware), _kept(layers, width))
    }


def _spectra(layers: list[dict], aware: bool) -> str:
    seen = (
        "as the activations of the calibration text feel them: their squares add up to the mean squared score."
        if aware
        else "of the weights alone: no calibration text was given, so directions that no input takes count in full."
    )
    drawn = (figures.spectrum({**row, "kept": row["ranks"]}) for row in layers)
    return section(
        "What each head needs",
        figure(
            "Singular values of W<sub>Q</sub>W<sub>K</sub>ᵀ",
            f'<div class="panels">{"".join(drawn)}</div>',
            f"Each thin line is one key head, the strong line the median head, {escape(seen)} Relative to the head’s "
            "largest (no unit). A dot marks the last channel a head kept; what lies to its right is gone. Of rotary "
            "channels a pair counts as two equal ones.",
        ),
    )


def _kept(layers: list[dict], width: int) -> str:
    rows = []
    for row in layers:
        low, high = min(row["ranks"]), max(row["ranks"])
        rows.append([
            str(row["layer"] + 1),
            str(low) if low == high else f"{low} to {high}",
            f"{fmean(row['ranks']):.1f}",
            f"{fmean(row['energy_kept']):.2%}",
            f"{min(row['energy_kept']):.2%}",
        ])  # fmt: skip
    head = ["Layer", f"Channels kept, of {width}", "Mean", "Energy kept, mean", "Energy kept, least"]
    note = "<p>Energy: the share of a head’s squared singular values that stayed.</p>"
    return section("What was kept", note, table(head, rows, "1234"))
