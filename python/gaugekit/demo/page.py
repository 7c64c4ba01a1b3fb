"""The demo's report as one self-contained HTML page: no script, no font, no picture from anywhere else.

``page(report)`` takes the fields of ``demo.run``'s Report, the ones report.json holds, and reads no other
source: what the page says is what the JSON says.
"""

from __future__ import annotations

import math
from html import escape

from gaugekit.pages import figures as figures
from gaugekit.pages.charts import is_number, superscript
from gaugekit.pages.document import document, figure, section, table
from gaugekit.pages.figures import DTYPES

GROUPS = {
    "value_output": (
        "Values and output",
        "A head’s values are read only through its output matrix. Turn one and turn the other back, and "
        "nothing changes: one square block of each head can be made the identity and need not be stored.",
    ),
    "query_key": (
        "Queries and keys",
        "Only products of queries with keys are ever used. Here too one square block of each head becomes "
        "the identity.",
    ),
    "key_bias": (
        "Key bias",
        "It adds the same amount to all scores of a row, and softmax ignores what is the same for all.",
    ),
    "value_bias": (
        "Value bias",
        "Attention weights sum to one, so it arrives unchanged at the output: it is added to the output "
        "bias once and for all.",
    ),
}


def page(report: dict) -> str:
    """The report as HTML; ``report`` is what report.json holds."""
    name = escape(report["model"])
    removed, before = report["parameters_removed"]["total"], report["parameters_before"]
    sections = (_removed, _same, _bytes, _speed, _seen, _limits)
    header = f"""<h1>What <span class="name">{name}</span> stores and nobody can see</h1>
<p class="lead">Some of a transformer’s stored numbers cannot be observed: change them together in the right
way, and every output stays the same. <strong>{removed:,} of {before:,} parameters
({removed / before:.2%})</strong> were removed here for that reason, exactly and without training. What remains
is not random either, so the files shrink further with <strong>no bit lost</strong>. Everything on this page
was measured in one run on the machine named at its end.</p>
{_strip(report)}"""
    return document(name, header, *(one(report) for one in sections), _footer(report))


def _strip(report: dict) -> str:
    bf16, attention = report["pack"]["bf16"], report["speed"]["attention"]
    exact = all(report["pack"][kind]["bit_exact"] for kind in DTYPES)
    tiles = [
        (
            f"{report['parameters_removed']['total']:,}",
            "parameters removed",
            "exact in real arithmetic, without training",
        ),
        (
            _ratio(report["fp32"]),
            "the rounding error of the original",
            f"in float32; {_ratio(report['bf16'])} in bfloat16. At 1 × both err alike",
        ),
        (
            f"−{1 - bf16['ratio']:.1%}",
            "bytes of the bfloat16 file",
            f"restored {'byte for byte' if exact else 'WITH DIFFERENCES'}; "
            f"{bf16['bits_per_weight']:.2f} bits a weight",
        ),
        (
            f"{attention['ratio']:.2f} ×",
            "speed of value-free attention",
            "beside a standard block of the same width; for models trained that way",
        ),
    ]
    cells = "".join(
        f'<div><dd>{value}</dd><dt>{what}<span class="why">{why}</span></dt></div>'
        for value, what, why in tiles
    )
    return f'<dl class="strip">{cells}</dl>'


def _removed(report: dict) -> str:
    removed, before = report["parameters_removed"], report["parameters_before"]
    rows = [
        [
            f'<strong>{name}</strong><span class="why">{why}</span>',
            f"{removed[group]:,}",
            f"{removed[group] / before:.3%}",
        ]
        for group, (name, why) in GROUPS.items()
    ]
    rows.append(["Together", f"{removed['total']:,}", f"{removed['total'] / before:.3%}"])
    return section(
        "What was removed",
        "<p>Four kinds of numbers make no difference to any output of the model, whatever text it reads. They "
        "are a small share of it, and they are free: no data, no training, no loss.</p>",
        table(["What, and why nobody can see it", "Parameters", "Share of model"], rows, "12", total=True),
    )


def _same(report: dict) -> str:
    rows = [
        [
            dtype,
            _small(report[kind]["noise"]),
            _small(report[kind]["relative_error"]),
            _ratio(report[kind]),
            _small(report[kind]["max_abs_error"]),
            _cosine(report[kind]["min_cosine"]),
            "yes" if report[kind]["ok"] else "NO",
        ]
        for kind, dtype in DTYPES.items()
    ]
    head = ["Format", "Noise of the original", "Error of the result", "Error over noise"]
    roads = [
        [escape(road), _small(found["max_abs_error"]), _cosine(found["min_cosine"])]
        for road, found in report["loaded"].items()
    ]
    return section(
        "Is it still the same model?",
        f"<p>{report['sentences']:,} English sentences went through the original and through the converted "
        "copy, and their sentence embeddings were compared. Rounded arithmetic never repeats a sum exactly, "
        "so the honest yardstick is the error the <em>original</em> makes in a format against itself in double "
        "precision. The result passes while its own error stays within 1.5 times that noise in float32 and "
        "1.2 times in bfloat16.</p>",
        table([*head, "Largest difference", "Smallest cosine", "Passes"], rows, "123456"),
        '<div class="pair">',
        *(
            figure(
                f"Error by layer, {dtype}",
                figures.error_by_layer(report, kind),
                "Relative error of the hidden states against the original in double precision (no unit, lower "
                "is better). Dashed grey: the unchanged original; solid: the converted model. Where they run "
                "together, the conversion is lost in rounding that was there anyway.",
            )
            for kind, dtype in DTYPES.items()
        ),
        "</div>",
        '<p class="next">Two roads lead to a running model: the converted directory loaded by the usual '
        "<code>from_pretrained</code>, and the original with its layers swapped in place by "
        "<code>gaugekit.fuse</code>. Both run on gaugekit’s operators, and their embeddings differ from the "
        "original’s by rounding only.</p>",
        table(["Road (float32)", "Largest difference", "Smallest cosine"], roads, "12"),
    )


def _bytes(report: dict) -> str:
    entropy = report["exponents"]["entropy_bits"]
    rows = [
        [
            dtype,
            f"{row['bytes_before']:,}",
            f"{row['bytes_after']:,}",
            f"{row['ratio']:.4f}",
            f"{row['bits_per_weight']:.2f}",
            "yes" if row["bit_exact"] else "NO",
        ]
        for kind, dtype in DTYPES.items()
        for row in [report["pack"][kind]]
    ]
    head = ["File", "Bytes before", "Bytes after", "After over before", "Bits a weight", "Bit-exact"]
    return section(
        "Fewer bytes, no bit lost",
        "<p>A bfloat16 number spends 8 of its 16 bits on the exponent, its order of magnitude. Trained weights "
        f"crowd around a few magnitudes, so {entropy:.2f} bits would do on average. gaugekit codes exponents "
        "that way and leaves the other bits alone. Unpacking restores the file byte for byte: SHA-256 sums "
        "before and after were compared.</p>",
        table(head, rows, "12345"),
        '<div class="pair">',
        figure(
            "Size of the weights file",
            figures.sizes(report),
            "Whole files, headers included: the original, without the unobservable parameters (gauge-fixed), "
            "losslessly packed, and both.",
        ),
        figure(
            "Orders of magnitude of the weights",
            figures.exponents(report),
            f"How often each exponent occurs among {report['exponents']['weights']:,} weights, in percent. "
            "Eight bits a weight are stored for it; the entropy, the least a code of one weight at a time "
            f"needs, is {entropy:.2f} bits.",
        ),
        "</div>",
    )


def _speed(report: dict) -> str:
    coding, attention = report["speed"]["coding"], report["speed"]["attention"]
    beside = "; ".join(
        f"{escape(name)} was left out: {escape(row['absent'])}"
        if "absent" in row
        else f"{escape(name)} leaves {row['ratio']:.1%} of the bytes"
        for name, row in coding["coders"].items()
    )
    return section(
        "Speed, measured in this run",
        '<div class="pair">',
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
            f"{attention['heads']} heads, float32; median of {attention['rounds']} interleaved rounds, shorter "
            "is better. A value-free block computes something else than a standard one: it is for models "
            "trained that way and cannot replace the layers of this model.",
        ),
        "</div>",
    )


def _seen(report: dict) -> str:
    layers = report["layers"]
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
            _span(row["ranks"]),
            f"{row['exponent_entropy_bits']:.2f}",
            f"{row['token_cosine']:.3f}" if is_number(row.get("token_cosine")) else "–",
        ]
        for row in layers
    ]
    drawing = figures.smoothing(report)
    head = [
        "Layer",
        "Rank of W<sub>Q</sub>W<sub>K</sub>ᵀ, by head",
        "Exponent entropy (bits)",
        "Token cosine",
    ]
    return section(
        "What else the weights show",
        "<p>Could more go? The next candidate is the rank of each head’s query-key product W<sub>Q</sub>"
        f"W<sub>K</sub>ᵀ: a head of low rank could be narrower. {verdict}</p>",
        figure(
            "Singular values of W<sub>Q</sub>W<sub>K</sub>ᵀ",
            f'<div class="panels">{"".join(figures.spectrum(row) for row in layers)}</div>',
            "Each thin line is one head, the strong line the median head, relative to the head’s largest singular "
            "value (no unit). A line that fell to zero early would be a head that can be made narrower for free.",
        ),
        table(head, rows, "123"),
        '<p class="note">Token cosine: the mean cosine between two tokens of a sentence at the input of the '
        "layer. The nearer to 1, the more alike the tokens have become (over-smoothing).</p>",
        figure(
            "Do the tokens become alike?",
            drawing,
            "Dashed grey: the token cosine of the table. Solid: the energy of each layer’s values, ½ Σ "
            "A<sub>ij</sub>‖v<sub>i</sub> − v<sub>j</sub>‖² over Σ‖v<sub>i</sub>‖², the mean over heads (no unit). "
            "A model that over-smooths has a cosine near 1 and an energy near 0.",
        )
        if drawing
        else "",
    )


def _limits(report: dict) -> str:
    return section(
        "What this does not say",
        "<ul>",
        *(f"<li>{escape(limit)}</li>" for limit in report["limits"]),
        "</ul>",
    )


def _footer(report: dict) -> str:
    machine = {key: escape(str(value)) for key, value in report["machine"].items()}
    steps = ", ".join(f"{step} {value:.1f} s" for step, value in report["seconds"].items() if step != "total")
    binary = "its C++ binary" if report["machine"]["binary"] else "no C++ binary (composition and NumPy)"
    return (
        f"<footer><p>Measured on {machine['name']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['vector']}; gaugekit {machine['gaugekit']} with {binary}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, python {machine['python']}; {escape(report['date'])}.</p>"
        f"<p>Time by step: {steps}; together {report['seconds']['total']:.0f} s. All numbers stand in "
        "report.json beside this page.</p></footer>"
    )


def _ratio(row: dict) -> str:
    if not (is_number(row["relative_error"]) and is_number(row["noise"])):
        return "not finite"
    if row["noise"] == 0:  # a model without noise: nothing to measure an error by
        return "no error" if row["relative_error"] == 0 else "error beside no noise"
    return f"{row['relative_error'] / row['noise']:.2f} ×"


def _small(value: float | None) -> str:
    """A small number as a person writes it: 2.7e-07 gives 2.7 · 10⁻⁷."""
    if not is_number(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(value))
    return f"{value / 10.0**power:.1f} · 10{superscript(power)}"


def _cosine(value: float | None) -> str:
    return f"{value:.7f}" if is_number(value) else "not finite"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
