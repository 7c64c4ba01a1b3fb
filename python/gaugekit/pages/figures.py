"""The figures of the report pages, each drawn from the fields of a report."""

from __future__ import annotations

import math

from gaugekit.pages.charts import Bar, Series, bars, columns, is_number, key, lines, superscript
from gaugekit.pages.markup import Html, html, joined

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def error_by_layer(report: dict, kind: str) -> Html:
    """Hidden-state errors of the converted model and of the original in its own dtype, layer by layer."""
    layers = report[kind]["layers"]
    both = [[row[name] for row in layers] for name in ("noise", "relative_error")]
    largest = max((value for values in both for value in values if is_number(value)), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    noise, error = (
        [value / 10.0**power if is_number(value) else None for value in values] for values in both
    )
    last = (f"{values[-1]:.2f}" if is_number(values[-1]) else "not finite" for values in (noise, error))
    return lines(
        [
            Series(noise, "noise", marks=True, label="original, rounding alone"),
            Series(error, "ours", marks=True, label="converted"),
        ],
        title=f"Relative error of the hidden states by layer, {DTYPES[kind]}",
        desc=f"After the last layer, in units of 1e{power}: original {next(last)}, converted {next(last)}",
        x_label="after layer (0: the embedding)",
        y_label=f"relative error (10{superscript(power)})",
        x_ticks=[(place, str(place)) for place in range(len(noise))],
        y_range=(0, largest / 10.0**power * 1.08 or 1.0),
        inset=0.15,
    )


def sizes(report: dict) -> Html:
    """Bytes of the weights file in each dtype: original, gauge-fixed, packed, both."""
    rows = [
        Bar(what, size, _size_kind(what), f"{size / 1e6:.1f} MB", f"stored as {dtype}")
        for kind, dtype in DTYPES.items()
        for what, size in report["bytes"][kind].items()
    ]
    return bars(rows, title="Size of the weights file", desc=_spoken(rows), x_label="megabytes (10⁶ bytes)")


def _size_kind(what: str) -> str:
    return {"original": "other", "gauge-fixed and packed": "alt"}.get(what, "ours")


def memory(report: dict) -> Html:
    """Memory of each model's parameters and buffers in bfloat16, plain and packed."""
    rows = [
        Bar(how, size, kind, f"{size / 1e6:.1f} MB", row["model"])
        for row in report["running"]
        for how, size, kind in (
            ("plain", row["bytes_before"], "other"),
            ("packed", row["bytes_after"], "ours"),
        )
    ]
    return bars(
        rows, title="Memory of the running model", desc=_spoken(rows), x_label="megabytes (10⁶ bytes)"
    )


def tokens(report: dict) -> Html:
    """Tokens a second of each model, plain and packed."""
    rows = [
        Bar(
            how,
            row[f"{how}_tokens_s"],
            kind,
            f"{row[f'{how}_tokens_s']:.1f}",
            f"{row['model']}, {row['work']}",
        )
        for row in report["running"]
        for how, kind in (("plain", "other"), ("packed", "ours"))
    ]
    return bars(rows, title="Tokens a second", desc=_spoken(rows), x_label="tokens a second, one thread")


def exponents(report: dict) -> Html:
    """How often each exponent occurs among the weights."""
    spread = report["exponents"]
    low = spread["low"]
    return columns(
        [100 * count / spread["weights"] for count in spread["counts"]],
        title="Histogram of the weights' exponents",
        desc=f"{len(spread['counts'])} exponents from 2^{low} on; entropy {spread['entropy_bits']:.2f} bits",
        x_label="magnitude of the weight",
        y_label="share of weights (%)",
        x_ticks=[
            (place, f"2{superscript(low + place)}")
            for place in range(len(spread["counts"]))
            if (low + place) % 5 == 0
        ],
    )


def coding(report: dict) -> Html:
    """Speed of coding and decoding weights beside zstd."""
    rows = []
    for field, verb in (("pack_gb_s", "pack"), ("unpack_gb_s", "unpack")):
        for name, row in report["speed"]["coding"]["coders"].items():
            if "absent" not in row:
                kind = "ours" if name == "gaugekit" else "other"
                rows.append(Bar(name, row[field], kind, f"{row[field]:.2f} GB/s", verb))
    return bars(
        rows, title="Packing and unpacking", desc=_spoken(rows), x_label="10⁹ bytes of weights a second"
    )


def attention(report: dict) -> Html:
    """Time of a standard and of a value-free attention sub-block."""
    measured = report["speed"]["attention"]
    standard, free = measured["standard_ms"], measured["value_free_ms"]
    rows = [
        Bar("standard: query, key, value and output projections", standard, "other", f"{standard:.1f} ms"),
        Bar("value-free: query and key projections only", free, "ours", f"{free:.1f} ms"),
    ]
    return bars(
        rows, title="One attention sub-block", desc=_spoken(rows), x_label="milliseconds a forward pass"
    )


def spectrum(row: dict) -> Html:
    """Singular values of W_Q W_Kᵀ of every head of one layer, each relative to the head's largest.

    A dead head, all of whose values are zero, is a line at zero. Where the row holds ``kept``, how many channels each
    head keeps, a dot stands on the last of them.
    """
    heads = zip(row["singular_values"], row.get("kept", [0] * len(row["singular_values"])), strict=True)
    heads = [([value / (values[0] or 1.0) for value in values], kept) for values, kept in heads]
    spectra = [values for values, _ in heads]
    dead = sum(values[0] == 0 for values in spectra)
    ends = [Series([values[kept - 1]], "ours", [kept], marks=True) for values, kept in heads if kept]
    width = max(map(len, spectra))
    middle = [sorted(column)[len(spectra) // 2] for column in zip(*spectra, strict=True)]
    places = list(range(1, width + 1))
    ticks = sorted({1, *(max(1, width * quarter // 4) for quarter in (1, 2, 3, 4))})
    return lines(
        [*(Series(values, "head", places) for values in spectra), Series(middle, "ours", places), *ends],
        title=f"Singular values in layer {row['layer'] + 1}",
        desc=f"{len(spectra)} heads; smallest over largest, median head: {middle[-1]:.2f}"
        + (f"; {dead} of them dead, with no value above zero" if dead else ""),
        x_label="singular value number",
        y_label="relative size",
        x_ticks=[(place, str(place)) for place in ticks],
        y_range=(0, 1),
        size=(290, 205),
        heading=f"layer {row['layer'] + 1}",
    )


def spectra(rows: list[dict]) -> Html:
    """``spectrum`` of each layer side by side, under one legend."""
    entries = [("one head", "head", "line"), ("median head", "ours", "line")]
    if "kept" in rows[0]:
        entries.append(("last channel kept", "ours", "dot"))
    return html(
        '<div class="key">{key}</div><div class="panels">{panels}</div>',
        key=key(entries),
        panels=joined(map(spectrum, rows)),
    )


def smoothing(report: dict) -> Html:
    """How alike the tokens are at the input of each layer, and the energy left in its values; "" without text."""
    cosines, energies = ([row.get(name) for row in report["layers"]] for name in ("token_cosine", "energy"))
    curves = ((cosines, "noise", "token cosine"), (energies, "ours", "energy of the values"))
    series = [Series(values, kind, marks=True, label=label) for values, kind, label in curves
              if any(map(is_number, values))]  # fmt: skip
    if not series:
        return Html()
    drawn = [value for line in series for value in line.y if is_number(value)]
    return lines(
        series,
        title="Token cosine and energy by layer",
        desc="; ".join(
            f"layer {place + 1}: cosine {value:.2f}" if is_number(value) else f"layer {place + 1}: no cosine"
            for place, value in enumerate(cosines)
        ),
        x_label="layer",
        y_label="no unit",
        x_ticks=[(place, str(place + 1)) for place in range(len(cosines))],
        y_range=(min(0, *drawn), 1.08 * max(drawn) or 1.0),
        inset=0.15,
    )


def _spoken(rows: list[Bar]) -> str:
    return "; ".join(f"{row.group} {row.label}: {row.text}".strip() for row in rows)
