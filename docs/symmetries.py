"""Writes docs/symmetries.md anew: what each group is, and what it comes to in published models, from their configs.

    python docs/symmetries.py

No weights are needed: every number is counted by ``gaugekit inspect`` from a config in docs/shapes.
tests/test_symmetries_page.py fails where the page is not what this writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import gaugekit
from gaugekit.models import FAMILIES
from gaugekit.report import Report

HERE = Path(__file__).resolve().parent
PAGE, SHAPES, WORDS = HERE / "symmetries.md", HERE / "shapes", HERE / "symmetries.txt"
TITLES = {
    "bert-base": "BERT-base", "deit-tiny": "DeiT-tiny", "whisper-tiny": "Whisper-tiny", "gpt2": "GPT-2",
    "opt-6.7b": "OPT-6.7B", "smollm2-135m": "SmolLM2-135M", "llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B",
    "qwen2.5-7b": "Qwen2.5-7B",
}  # fmt: skip
# The groups in the order of the page, those that never occur among these models left out
ROWS = {
    "value_output": "values and output, `value_output`",
    "query_key": "queries and keys, `query_key`",
    "key_bias": "key bias, `key_bias`",
    "value_bias": "value bias, `value_bias`",
    "rotary_pairs": "rotary pairs, `rotary_pairs`",
    "norm_gains": "gains of norms, `norm_gains`",
    "norm_biases": "biases of norms, `norm_biases`",
    "stream_means": "means of the stream, `stream_means`",
    "stream_offsets": "constants in two places, `stream_offsets`",
    "stream_rotation": "basis of the stream, `stream_rotation`",
    "neuron_scales": "hidden units, `neuron_scales`",
}


def reports() -> dict[str, Report]:
    """{name: what ``inspect`` says} of each config whose family has an adapter."""
    configs = {name: json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8")) for name in TITLES}
    return {
        name: gaugekit.inspect(config) for name, config in configs.items() if config["model_type"] in FAMILIES
    }


def table(found: dict[str, Report]) -> str:
    """The counts as Markdown, one column a model."""
    lines = [
        "| | " + " | ".join(TITLES[name] for name in found) + " |",
        "| --- |" + " ---: |" * len(found),
        _row("parameters", [f"{report['parameters']:,}" for report in found.values()]),
    ]
    for group, words in ROWS.items():
        lines.append(_row(words, [_count(report["unobservable"][group]) for report in found.values()]))
    for words, count in (
        ("**all of them**", lambda report: report["unobservable"]["total"]),
        ("… of the model", lambda report: _share(report["unobservable"]["total"], report)),
        ("**removed by `--gauge`**", lambda report: report["removable"]),
        ("… of the model", lambda report: _share(report["removable"], report)),
        ("order of heads and units, bits", lambda report: round(report["permutation_bits"])),
    ):
        cells = [count(report) for report in found.values()]
        lines.append(_row(words, [cell if isinstance(cell, str) else f"{cell:,}" for cell in cells]))
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return WORDS.read_text(encoding="utf-8").replace("{table}\n", table(reports()))


def _row(words: str, cells: list[str]) -> str:
    return f"| {words} | {' | '.join(cells)} |"


def _count(size: int) -> str:
    return f"{size:,}" if size else "–"


def _share(size: int, report: Report) -> str:
    return f"{100 * size / report['parameters']:.3f} %"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
