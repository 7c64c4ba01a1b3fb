"""The appendix of the demo's page: ranks, magnitudes, smoothing, and what coding and attention cost."""

from __future__ import annotations

from gaugekit.pages import figures
from gaugekit.pages.charts import is_number
from gaugekit.pages.document import figure, section, table
from gaugekit.pages.markup import Html, html, joined
from gaugekit.pages.numbers import span

WQK = Html("W<sub>Q</sub>W<sub>K</sub>ᵀ")


def appendix(report: dict) -> Html:
    return section(
        "Appendix: inside the weights",
        _ranks(report["layers"]),
        Html('<div class="pair">'),
        figure(
            "Orders of magnitude of the weights",
            figures.exponents(report),
            f"How often each exponent occurs among {report['exponents']['weights']:,} weights, in percent. Eight "
            f"bits a weight are stored for it; the entropy, the least a code of one weight at a time needs, is "
            f"{report['exponents']['entropy_bits']:.2f} bits.",
        ),
        _smoothing(report),
        *_timings(report),
        Html("</div>"),
    )


def _ranks(layers: list[dict]) -> Html:
    full = all(
        rank == len(s) for row in layers for rank, s in zip(row["ranks"], row["singular_values"], strict=True)
    )
    verdict = (
        "Here every head has full rank, and in most heads the singular values fall slowly: cutting would change "
        "answers, so nothing was cut."
        if full
        else "Here some heads have less than full rank; the table says in which layers."
    )
    rows = [
        [
            str(row["layer"] + 1),
            span(row["ranks"]),
            f"{row['exponent_entropy_bits']:.2f}",
            f"{row['token_cosine']:.3f}" if is_number(row.get("token_cosine")) else "–",
        ]
        for row in layers
    ]
    return joined([
        html(
            "<p>Could more go? A head compares two tokens through {product} alone: one of low rank could be "
            "narrower. {verdict}</p>",
            product=WQK,
            verdict=verdict,
        ),
        figure(
            html("Singular values of {product}", product=WQK),
            figures.spectra(layers),
            "Each relative to the head’s largest singular value (no unit). A line that fell to zero early would be a "
            "head that can be made narrower for free.",
        ),
        table(
            ["Layer", html("Rank of {product}, by head", product=WQK), "Exponent entropy (bits)", "Token cosine"],
            rows,
            "123",
        ),
        Html(
            '<p class="note">Token cosine: the mean cosine between two tokens of a sentence at the input of the '
            'layer. The '
            "nearer to 1, the more alike the tokens have become (over-smoothing).</p>"
        ),
    ])  # fmt: skip


def _smoothing(report: dict) -> Html:
    drawing = figures.smoothing(report)
    if not drawing:
        return Html()
    return figure(
        "Do the tokens become alike?",
        drawing,
        Html(
            "The token cosine of the table, and the energy of each layer’s values, ½ Σ A<sub>ij</sub>‖v<sub>i</sub> "
            "− v<sub>j</sub>‖² over Σ‖v<sub>i</sub>‖², the mean over heads (no unit). A model that over-smooths has "
            "a cosine near 1 and an energy near 0."
        ),
    )


def _timings(report: dict) -> list[Html]:
    coding, attention = report["speed"]["coding"], report["speed"]["attention"]
    beside = "; ".join(
        f"{name} was left out: {row['absent']}"
        if "absent" in row
        else f"{name} leaves {row['ratio']:.1%} of the bytes"
        for name, row in coding["coders"].items()
    )
    return [
        figure(
            "Packing and unpacking",
            figures.coding(report),
            f"In memory, each on one thread, the bfloat16 weights ({coding['bytes'] / 1e6:.0f} MB), median of "
            f"{coding['rounds']} interleaved rounds; longer is better. {beside}.",
        ),
        figure(
            "One attention sub-block",
            figures.attention(report),
            f"Batch {attention['batch']}, {attention['tokens']} tokens, width {attention['width']}, "
            f"{attention['heads']} heads, float32, one thread; median of {attention['rounds']} interleaved rounds, "
            f"shorter is better. A value-free block computes something else than a standard one: it is for models "
            f"trained that way and cannot replace the layers of this model.",
        ),
    ]
