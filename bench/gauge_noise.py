"""What fixing the gauge costs in 16 bits, by choice of rows: a model's error beside the dtype's own noise.

    python bench/gauge_noise.py                          # SmolLM2 in bfloat16: some ten minutes on two cores
    python bench/gauge_noise.py MODEL --dtype float32 --rows balanced triangular
    python bench/gauge_noise.py --text FILE --text FILE --save

``ratio`` is ``relative_error / noise`` of ``gaugekit verify`` on 2,048 tokens or more of a text: what the fixed model
errs by over what the dtype costs the original. One text of that length does not settle it for weights that are numbers
of the dtype already, as SmolLM2's are: read the rows together. Texts: English sentences one by one (80) and joined,
Python's documentation, and those of ``--text``. ``--dense`` stores the fixed model in the plain layout, so that both
attend through transformers.

The ratio depends on how the processor multiplies 16-bit numbers. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
before the command shows that of processors without such instructions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gaugekit as gk
from documentation import learnt_and_measured
from gaugekit import samples
from gaugekit.hf import loading
from gaugekit.symmetry.rows import CHOICES
from run import commit, machine, save

TOKENS, WINDOW = 2048, 512


def cut(source: Path, text: str) -> list[str]:
    """Pieces of ``text`` of about WINDOW tokens, TOKENS in all."""
    tokenizer = loading.tokenizer(source)
    window = min(WINDOW, loading.positions(loading.config(source)) - 2)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[start : start + window]) for start in range(0, TOKENS, window)]


def rows_of(
    source: Path, choices: list[str], texts: dict[str, list[str]], dtype: str, dense: bool
) -> Iterator[dict]:
    """A row for every choice and text, each as it is measured."""
    with tempfile.TemporaryDirectory() as work:
        for choice in choices:
            target = Path(work) / choice
            fixed = gk.convert(source, target, [gk.symmetry.GaugeFix(rows=choice)], dtype=dtype, dense=dense)
            for name, text in texts.items():
                report = gk.verify(source, target, text=text, dtype=dtype, batch_size=1)
                yield {
                    "op": "gauge_noise", "shape": source.name, "dtype": dtype, "label": f"{choice}, {name}",
                    "rows": choice, "text": name, "dense": dense, "tokens": report["tokens"],
                    "noise": report["noise"], "relative_error": report["relative_error"],
                    "ratio": report["relative_error"] / report["noise"],
                    "removed": fixed["parameters_before"] - fixed["parameters_after"],
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--rows", nargs="+", choices=CHOICES, default=["balanced", "max_volume", "triangular"]
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    source = options.model or samples.smollm2()
    read = {"joined sentences": " ".join(samples.sentences(500)), "documentation": learnt_and_measured()[1]}
    read |= {path.name: path.read_text(encoding="utf-8") for path in options.text}
    texts = {"short sentences": samples.sentences(80)}
    texts |= {name: cut(source, text) for name, text in read.items()}
    where = {"machine": machine("cpu"), "commit": commit()}
    for row in rows_of(source, options.rows, texts, options.dtype, options.dense):
        print(json.dumps(row | where), file=sys.stderr, flush=True)
        print(f"{row['label']}: {row['ratio']:.3f} of {row['noise']:.2e}, {row['tokens']} tokens", flush=True)
        if options.save:
            save([row | where], f"gauge_noise-{source.name}", "cpu")


if __name__ == "__main__":
    main()
