"""The demo's report as one self-contained HTML page: no script, no font, no picture from anywhere else.

``page(report)`` takes the fields of ``demo.run``'s Report, the ones report.json holds, and reads no other
source: what the page says is what the JSON says. First what it brings, then the proof, then what nobody can observe;
what only a reader of papers asks for stands in the appendix.
"""

from __future__ import annotations

from gaugekit.demo.appendix import appendix
from gaugekit.pages import figures
from gaugekit.pages.document import document, figure, section, small, table
from gaugekit.pages.figures import DTYPES
from gaugekit.pages.markup import Html, html, joined
from gaugekit.pages.numbers import change, cosine, over_noise, power_of_ten

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


def page(report: dict) -> Html:
    """The report as HTML; ``report`` is what report.json holds."""
    sections = (_brings, _proof, _unobservable, _try, _limits, appendix)
    header = html(
        """<h1>The same model in <span class="name">{share:.0f} %</span> of its bytes</h1>
<p class="lead">A trained network spends more bits on its weights than they hold. gaugekit stores
<strong>{name}</strong> in fewer bytes, as a file and in memory, and gives back <strong>every bit</strong>. Everything
on this page was measured in one run on the machine named at its end.</p>
{strip}""",
        share=100 * report["pack"]["bf16"]["ratio"],
        name=report["model"],
        strip=_strip(report),
    )
    return document(report["model"], header, *(part(report) for part in sections), _footer(report))


def _strip(report: dict) -> Html:
    packed, encoder, speaker = report["pack"]["bf16"], report["running"][0], report["running"][-1]
    exact = _exact(report)
    tiles = [
        (change(packed["ratio"]), "the file", f"{report['model']} in bfloat16, packed without loss"),
        (change(encoder["memory_ratio"]), "memory while it runs", "weights stay packed and are decoded in the product"),
        (
            f"{speaker['plain_tokens_s']:.1f} → {speaker['packed_tokens_s']:.1f}",
            "tokens a second, plain → packed",
            f"{speaker['model']}, {speaker['work']}, one thread: {speaker['speed_ratio']:.2f} times",
        ),
        (
            "bit-exact" if exact else "NOT EXACT",
            "files and weights",
            "files by their SHA-256 after unpacking, weights in memory one by one"
            if exact
            else "a file or a weight came back DIFFERENT",
        ),
    ]  # fmt: skip
    cells = (
        html("<div><dd>{value}</dd><dt>{what}{why}</dt></div>", value=value, what=what, why=small(why))
        for value, what, why in tiles
    )
    return html('<dl class="strip">{cells}</dl>', cells=joined(cells))


def _exact(report: dict) -> bool:
    files = all(report["pack"][kind]["bit_exact"] for kind in DTYPES)
    return files and all(row["bit_exact"] for row in report["running"])


def _brings(report: dict) -> Html:
    return section(
        "What it brings",
        html(
            "<p>A bfloat16 number spends 8 of its 16 bits on its order of magnitude. Trained weights crowd around a "
            "few magnitudes, so {entropy:.2f} bits would do on average. gaugekit codes these bits and leaves the "
            "others alone.</p>",
            entropy=report["exponents"]["entropy_bits"],
        ),
        _files(report),
        _running(report),
        _words(report),
        Html('<div class="pair">'),
        figure(
            "Size of the weights file",
            figures.sizes(report),
            "Whole files, headers included: the original; without what nobody can observe (gauge-fixed, see below); "
            "packed; and both.",
        ),
        figure(
            "Memory of the running model",
            figures.memory(report),
            "All parameters and buffers in bfloat16. Matrices stay packed, vectors (norms, biases) stay plain.",
        ),
        figure(
            "Tokens a second",
            figures.tokens(report),
            "Medians over steps that the plain and the packed model took in turns, one thread; longer is better. "
            "Which of the two is faster depends on the processor.",
        ),
        Html("</div>"),
    )


def _files(report: dict) -> Html:
    rows = [
        [
            f"{report['model']}, {dtype}",
            f"{row['bytes_before']:,}",
            f"{row['bytes_after']:,}",
            change(row["ratio"]),
            f"{row['bits_per_weight']:.2f}",
            "yes" if row["bit_exact"] else "NO",
        ]
        for kind, dtype in DTYPES.items()
        for row in [report["pack"][kind]]
    ]
    head = ["File", "Bytes before", "Bytes after", "Change", "Bits a weight", "Bit-exact"]
    return table(head, rows, "12345")


def _running(report: dict) -> Html:
    rows = [
        [
            row["model"],
            f"{row['bytes_before'] / 1e6:,.1f} MB",
            f"{row['bytes_after'] / 1e6:,.1f} MB",
            change(row["memory_ratio"]),
            f"{row['plain_tokens_s']:.1f}",
            f"{row['packed_tokens_s']:.1f}",
            f"{row['plain_perplexity']:.3f}, {row['packed_perplexity']:.3f}"
            if "plain_perplexity" in row
            else "–",
        ]
        for row in report["running"]
    ]
    head = ["Running, bfloat16", "Memory, plain", "Memory, packed", "Change", "Tokens a second, plain"]
    return table([*head, "Tokens a second, packed", "Perplexity, plain and packed"], rows, "123456")


def _words(report: dict) -> Html:
    """What the table of running models leaves open: what its numbers mean, or why there is only one row."""
    if report["absent"]:
        return html(
            '<p class="note">No language model was run beside it: {why}.</p>',
            why=report["absent"].rstrip("."),
        )
    speaker = report["running"][-1]
    if "plain_perplexity" not in speaker:
        return Html()
    return html(
        '<p class="note">Perplexity: how surprised {model} is by {tokens} tokens of Python’s language reference '
        "(lower is better). Packed weights are the same bits; the sums are taken in another order, so the last digit "
        "may move. Of {new} tokens written one by one, the first {same} were the same. {note}</p>",
        model=speaker["model"],
        tokens=speaker["perplexity_tokens"],
        new=speaker["new_tokens"],
        same=speaker["same_tokens"],
        note=speaker["note"],
    )


def _proof(report: dict) -> Html:
    rows = [
        [
            dtype,
            power_of_ten(report[kind]["noise"]),
            power_of_ten(report[kind]["relative_error"]),
            over_noise(report[kind]),
            f"{report['noise_limits'][kind]:g} ×",
            cosine(report[kind]["min_cosine"]),
            "yes" if report[kind]["ok"] else "NO",
        ]
        for kind, dtype in DTYPES.items()
    ]
    roads = [
        [road, power_of_ten(proof["max_abs_error"]), cosine(proof["min_cosine"])]
        for road, proof in report["loaded"].items()
    ]
    return section(
        "The proof",
        html(
            "<p>Packing is proved by comparing bits. Removing what nobody can observe (the next section) is exact in "
            "real arithmetic, but numbers are rounded again; so {count:,} English sentences went through the "
            "original and through the converted copy, and their sentence embeddings were compared. The yardstick is "
            "the error that the <em>original</em> makes in a format against itself in double precision, its noise. "
            "The result passes while its own error stays below the limit.</p>",
            count=report["sentences"],
        ),
        table(
            ["Format", "Noise of the original", "Error of the result", "Error over noise", "Limit", "Least cosine",
             "Passes"],
            rows,
            "123456",
        ),
        Html('<div class="pair">'),
        *(
            figure(
                f"Error by layer, {dtype}",
                figures.error_by_layer(report, kind),
                "Relative error of the hidden states against the original in double precision (no unit, lower is "
                "better). Where the lines run together, the conversion is lost in rounding that was there anyway.",
            )
            for kind, dtype in DTYPES.items()
        ),
        Html("</div>"),
        Html(
            '<p class="next">Two roads lead to a running model: the converted directory loaded by the usual '
            "<code>from_pretrained</code>, and the original with its layers swapped in place by "
            "<code>gaugekit.fuse</code>. Their embeddings differ from the original’s by rounding only.</p>"
        ),
        table(["Road (float32)", "Largest difference", "Least cosine"], roads, "12"),
    )  # fmt: skip


def _try(report: dict) -> Html:
    return section(
        "Try it on your own model",
        Html(
            "<p>MODEL is a local Hugging Face directory: config.json and safetensors. Nothing is written over "
            "it.</p>\n<pre><code>gaugekit inspect MODEL            # what could go, and how far it would pack\n"
            "gaugekit pack MODEL PACKED        # the same bits in fewer bytes\n"
            "gaugekit verify MODEL PACKED      # the proof</code></pre>\n"
            "<p>In Python, <code>gaugekit.fuse(model, packed=True)</code> packs the weights of a model in memory, "
            "and <code>gaugekit.unfuse(model)</code> gives them back.</p>"
        ),
    )


def _unobservable(report: dict) -> Html:
    removed, before = report["parameters_removed"], report["parameters_before"]
    rows = [
        [
            html("<strong>{name}</strong>{why}", name=name, why=small(why)),
            f"{removed[group]:,}",
            f"{removed[group] / before:.3%}",
        ]
        for group, (name, why) in GROUPS.items()
    ]
    rows.append(["Together", f"{removed['total']:,}", f"{removed['total'] / before:.3%}"])
    return section(
        "What nobody can observe",
        html(
            "<p>Some of a transformer’s numbers cannot be seen from outside: change them together in the right way, "
            "and every output stays the same. That freedom is called a gauge, and fixing it removes numbers without "
            "data, training or loss: here {total:,} of {before:,} parameters ({share:.2%}). The share is small, and "
            "the model does not get faster by it.</p>",
            total=removed["total"],
            before=before,
            share=removed["total"] / before,
        ),
        table(["What, and why nobody can see it", "Parameters", "Share of model"], rows, "12", total=True),
    )


def _limits(report: dict) -> Html:
    items = joined(html("<li>{limit}</li>\n", limit=limit) for limit in report["limits"])
    return section("What this does not say", html("<ul>{items}</ul>", items=items))


def _footer(report: dict) -> Html:
    machine = report["machine"]
    steps = ", ".join(f"{step} {value:.1f} s" for step, value in report["seconds"].items() if step != "total")
    return html(
        "<footer><p>Measured on {m[name]}, {m[cores]} cores, one thread, {m[vector]}; gaugekit {m[gaugekit]} with "
        "{binary}, torch {m[torch]}, transformers {m[transformers]}, python {m[python]}; {date}.</p>"
        "<p>Time by step: {steps}; together {total:.0f} s. All numbers stand in report.json beside this "
        "page.</p></footer>",
        m=machine,
        binary="its C++ binary" if machine["binary"] else "no C++ binary (composition and NumPy)",
        date=report["date"],
        steps=steps,
        total=report["seconds"]["total"],
    )
