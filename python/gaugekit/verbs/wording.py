"""What the reports of the verbs say in words: figures with their limits, one sentence, and what comes next."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gaugekit.codec.files.container import seems_packed
from gaugekit.report import Report, change, figure, shell, size, spread
from gaugekit.symmetry import REMOVED

GROUPS = {
    "value_output": "between values and output",
    "query_key": "between queries and keys",
    "key_bias": "biases of keys",
    "value_bias": "biases of values",
    "rotary_pairs": "scales of rotary pairs",
    "plain_query_key": "queries and keys, channels that do not turn",
    "plain_key_bias": "biases of keys, channels that do not turn",
    "query_key_gains": "gains of norms of queries and keys",
    "query_key_turns": "channels of one gain, turned",
    "query_key_means": "means of queries and keys",
    "norm_gains": "gains of norms",
    "norm_biases": "biases of norms",
    "stream_means": "means of the stream",
    "stream_offsets": "constants in two places",
    "stream_rotation": "basis of the stream",
    "neuron_scales": "scales of hidden units",
    "layer_scales": "scales of what layers add",
}


LAYERS = (
    "layers (heads from least to most; effective rank: how many singular values matter; token cosine of what enters; "
    "energy: how far the values of a text lie apart, 0 where all agree)"
)


def inspected(report: Report, model: str | Path | torch.nn.Module, smooth: float) -> Report:
    """``report`` of ``inspect``, told; ``smooth`` is the token cosine from which on a model over-smooths."""
    fields, hidden = report.fields, report["unobservable"]
    share = 100 * hidden["total"] / max(fields["parameters"], 1)
    report.lines = [
        ("parameters", f"{fields['parameters']:,} floating-point numbers"),
        ("unobservable", f"{hidden['total']:,}, {share:.2f} % of them: no output depends on these"),
        *(
            (f"  {told}", f"{hidden[name]:,}")
            for name, told in GROUPS.items()
            if hidden[name] or name in REMOVED
        ),
        ("removable", f"{fields['removable']:,} by gauge fixing; the others stay stored, fixed or not"),
        (
            "orders",
            f"{fields['permutation_bits']:,.0f} bits: of heads and hidden units, which may change places",
        ),
    ]
    if fields["exponent_entropy_bits"] is not None:
        entropy = f"{fields['exponent_entropy_bits']:.2f} bits of the 8 that bfloat16 stores"
        report.lines.append(("exponent entropy", entropy))
    if fields["token_cosine"] is not None:
        cosine = f"{fields['token_cosine']:.2f} between two tokens of a text, in the output"
        report.lines.append(("token cosine", f"{cosine}; over-smoothed from {smooth}"))
    report.tables = {LAYERS: [_layer(row) for row in fields["layers"]]}
    report.done = f"Read {len(fields['layers'])} layers of {_name(model)}; nothing was written."
    if not fields["layers"]:
        report.done = f"Counted what {_name(model)} describes, without weights; nothing was written."
        report.next = "gaugekit inspect MODEL, for a directory with weights"
    elif isinstance(model, torch.nn.Module):
        report.next = "gaugekit.fuse(model), which removes what cannot be observed from this instance"
    else:
        report.next = f"gaugekit convert {shell(model)} OUT --gauge"
    return report


def _layer(row: dict[str, Any]) -> str:
    widest = max(len(values) for values in row["singular_values"])
    cells = [
        f"layer {row['layer']}",
        f"ranks {spread(row['ranks'])} of {widest}",
        f"effective ranks {spread(row['effective_ranks'])}",
        f"exponent entropy {row['exponent_entropy_bits']:.2f} bits",
    ]
    for name, label in (("token_cosine", "token cosine"), ("energy", "energy")):
        if row.get(name) is not None:
            cells.append(f"{label} {row[name]:.2f}")
    return ", ".join(cells)


def converted(report: Report, source: str | Path, target: str | Path) -> Report:
    """``report`` of ``convert``, told."""
    fields = report.fields
    counts, sizes = (
        tuple(fields[f"{what}_{when}"] for when in ("before", "after")) for what in ("parameters", "bytes")
    )
    report.lines = [
        ("parameters", f"{counts[0]:,} before, {counts[1]:,} after: {counts[0] - counts[1]:,} fewer"),
        ("weight files", f"{size(sizes[0])} before, {size(sizes[1])} after: {change(*sizes)}"),
        ("time", f"{fields['seconds']:.1f} s"),
    ]
    if fields["invariance_error"] is not None:
        error = f"{fields['invariance_error']:.1e} of its output at most, in float64 and before rounding"
        report.lines.insert(2, ("error of a layer", error))
    report.tables = {"steps": [_step(step) for step in fields["steps"]]}
    names = ", ".join(step["rewrite"] for step in fields["steps"])
    report.done = f"Rewrote {source} ({names}) and wrote the result, with its certificate, to {target}."
    report.next = f"gaugekit verify {shell(source)} {shell(target)}"
    return report


def _step(step: dict[str, Any]) -> str:
    removed = step.get("removed", {}).get("total")
    cells = [f"{step['rewrite']}: {step['claim']}" if "claim" in step else f"{step['rewrite']}"]
    if removed is not None:
        cells.append(f"{removed:,} numbers removed")
    cells += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in step.items()
              if name not in ("rewrite", "claim", "removed", "aware") and _short(value)]  # fmt: skip
    if "aware" in step:
        cells.append("channels chosen by calibration text" if step["aware"] else "no calibration text")
    return ", ".join(cells)


def _short(value: Any) -> str:
    """An argument of a rewrite in a few characters; empty where it has no such form."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return figure(value)
    if isinstance(value, list):
        numbers = [x for row in value for x in (row if isinstance(row, list) else [row])]
        return spread(numbers) if numbers and all(isinstance(x, int | float) for x in numbers) else ""
    return value if isinstance(value, str) else ""


def verified(report: Report, limit: float | None, a: object, b: object) -> Report:
    """``report`` of ``verify``, told; ``limit`` is how many times the noise is allowed, None an absolute bound."""
    fields = report.fields
    noise, error, dtype = fields["noise"], fields["relative_error"], fields["dtype"]
    compared = f"{fields['rows']:,} rows of {fields['output']}, from {fields['tokens']:,} tokens or images"
    report.lines = [
        ("verdict", "passes" if fields["ok"] else "FAILS"),
        ("error", _error(noise, error, limit)),
    ]
    if noise is not None:
        what = f"what {dtype} itself costs the original, beside {fields['reference_dtype']}"
        report.lines.append(("noise", f"{noise:.2e} of the output: {what}"))
    if fields["max_abs_error"] is not None:
        report.lines += [
            (
                "largest difference",
                f"{fields['max_abs_error']:.2e} in one number of the output; for information",
            ),
            ("least cosine", f"{fields['min_cosine']:.7f} of a row of b with that of a; for information"),
        ]
    report.lines.append(("compared", compared))
    report.tables = {
        "layers": [
            f"layer {row['layer']}: {_error(row['noise'], row['relative_error'], None, bound=None)}"
            for row in fields["layers"]
        ]
    }
    verdict = "within" if fields["ok"] else "more than"
    ran = f"Ran {_name(a)} and {_name(b)} on the same input"
    report.done = f"{ran}: the error is {verdict} what an exact rewrite may have; nothing was written."
    live = isinstance(a, torch.nn.Module) or isinstance(b, torch.nn.Module)
    if fields["ok"] and live:
        report.next = "model.save_pretrained(folder)"
    elif fields["ok"] and _is_packed(b):
        report.next = f"from_pretrained({str(b)!r}), after import gaugekit.integrations.transformers"
    elif fields["ok"]:
        report.next = f"gaugekit pack {shell(b)} OUT"
    else:
        verb = "gaugekit.heal(b, a, text)" if live else f"gaugekit heal {shell(b)} {shell(a)} OUT --text FILE"
        report.next = f"{verb}, if {'b' if live else b} is meant to differ (a lower rank, a slice)"
    return report


def certified(report: Report, certificate: Path, b: Path) -> Report:
    """``report`` of ``check_certificate``, told, in words of ``verified`` before."""
    fields, then = report.fields, report["certified"]
    report.lines[0] = ("verdict", "holds" if fields["ok"] else "FAILS")
    report.lines.insert(1, ("weights", "every tensor and config is the one that was certified"))
    if then is not None:
        report.lines.insert(
            3, ("certified error", _error(then["noise"], then["relative_error"], None, bound=None))
        )
    verdict = "holds" if fields["ok"] else "does not hold"
    report.done = f"Ran both models again: what {certificate} says of {b} {verdict}; nothing was written."
    report.next = (
        f"gaugekit pack {shell(b)} OUT" if fields["ok"] else "see the errors above, and the versions in it"
    )
    return report


def _is_packed(folder: str | Path) -> bool:
    return any(seems_packed(path) for path in Path(folder).glob("*.safetensors"))


def _error(noise: float | None, error: float | None, limit: float | None, bound: float | None = 1e-12) -> str:
    if error is None:
        return "not computed, see below"
    limits = ""
    if bound is not None:
        limits = f", limit {bound:g} of the output" if limit is None else f", limit {limit:g}"
    if not noise or (limit is None and bound is not None):
        return f"{error:.2e} of the output{limits}"
    return f"{error / noise:.2f} × noise{limits} ({error:.2e} of the output)"


def healed(report: Report, student: object, teacher: object, target: str | Path | None = None) -> Report:
    """``report`` of ``heal``, told."""
    fields, before = report.fields, report["curve"][0]
    after = fields["curve"][-1]
    report.lines = [("trained", f"{fields['parameters']:,} parameters, {fields['steps']:,} steps")]
    of_states = "mean_cosine" in before
    if of_states:
        report.lines += [
            (
                "mean cosine",
                f"{fields['mean_cosine_before']:.5f} before, {fields['mean_cosine_after']:.5f} after: of student and "
                "teacher, embeddings of sentences held out; 1 where they agree",
            ),
            (
                "least cosine",
                f"{before['min_cosine']:.5f} before, {after['min_cosine']:.5f} after: the worst sentence",
            ),
        ]
    else:
        report.lines += [
            (
                "divergence",
                f"{fields['divergence_before']:.4f} before, {fields['divergence_after']:.4f} after: nats a token "
                "between what student and teacher foretell of sentences held out; 0 where they agree",
            ),
            (
                "agreement",
                f"{100 * before['agreement']:.1f} % before, {100 * after['agreement']:.1f} % after: tokens after which "
                "both hold the same one most likely",
            ),
        ]
    measure, told = ("mean_cosine", "mean cosine") if of_states else ("agreement", "agreement")
    report.tables = {
        "curve": [
            f"{row['stage']}, step {row['step']}: loss {row['loss']:.4g}, {told} {row[measure]:.5f}"
            for row in fields["curve"]
        ]
    }
    compare = "" if of_states else " --perplexity FILE"
    if target is None:
        report.done = f"Trained {_name(student)} in place towards {_name(teacher)}; nothing was written."
        report.next = (
            "gaugekit.verify(teacher, student)" if of_states else "gaugekit.perplexity(student, text)"
        )
    else:
        report.done = f"Trained {student} towards {teacher} and wrote the result to {target}."
        report.next = f"gaugekit verify {shell(str(teacher))} {shell(target)}{compare}"
    return report


ALREADY = "it is fused already; unfuse it first"  # why ``fuse`` does nothing to a model


def fused(report: Report, model: torch.nn.Module) -> Report:
    """``report`` of ``fuse``, told."""
    fields = report.fields
    forms = [entry["form"] for entry in fields["replaced"]]
    counts = (fields["parameters_before"], fields["parameters_after"])
    report.lines = [
        (
            "replaced",
            ", ".join(f"{forms.count(form)} × {form}" for form in dict.fromkeys(forms)) or "no layer",
        ),
        ("rewritten, still plain", f"{len(fields['rewritten'])} layers that take up what the others lost"),
        ("attention", fields["attention"] or "the model's own"),
        ("parameters", f"{counts[0]:,} before, {counts[1]:,} after"),
    ]
    ways = Counter((entry["product"], entry["reason"]) for entry in fields["products"])
    for (product, reason), times in ways.items():
        name = "our kernel" if product == "kernel" else "torch, a dense weight"
        report.lines.append(("compact products", f"{times} by {name}: {reason}"))
    if "bytes_before" in fields:
        sizes = (fields["bytes_before"], fields["bytes_after"])
        report.lines += [
            ("memory", f"{size(sizes[0])} before, {size(sizes[1])} after: {change(*sizes)}"),
            (
                "plain vectors",
                f"{fields['plain_in_vectors']:,} numbers of norms and biases, which are not packed",
            ),
        ]
        report.notes += fields["speed"]
    if "cached" in fields and ALREADY not in [entry["reason"] for entry in fields["left"]]:
        report.lines.append(("cache", _cached(fields["cached"])))
    changed = bool(
        fields["replaced"] or fields["rewritten"] or fields["attention"] == "gaugekit" or fields.get("cached")
    )
    name = type(model).__name__
    report.done = (
        f"Fused this {name} in memory; nothing was written." if changed else f"Left this {name} as it was."
    )
    report.next = (
        "model.save_pretrained(folder), or gaugekit.unfuse(model), which undoes it" if changed else ""
    )
    report.next = report.next or "see above what stood in the way"
    return report


def _cached(layers: list[dict[str, Any]]) -> str:
    """How many bytes a token takes in the cache of the layers that keep one tensor."""
    if not layers:
        return "keys and values in every layer, as before"
    before, after = (sum(layer[name] for layer in layers) for name in ("bytes_before", "bytes_after"))
    told = f"{len(layers)} layers keep their {layers[0]['holds']} alone"
    return f"{told}: {before:,} bytes a token before, {after:,} after: {change(before, after)}"


def unfused(report: Report, model: torch.nn.Module) -> Report:
    """``report`` of ``unfuse``, told."""
    count = len(report["restored"])
    report.lines = [("restored", f"{count} layers"), ("attention", report["attention"] or "the model's own")]
    report.done = (
        f"Put back {count} layers of this {type(model).__name__}, weights bit for bit; nothing was written."
    )
    report.next = "gaugekit.fuse(model) fuses it again"
    return report


def _name(model: object) -> str:
    if isinstance(model, torch.nn.Module):
        return f"this {type(model).__name__}"
    return str(model)
