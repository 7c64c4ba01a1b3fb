"""Gauge-fixes a model and proves that it still answers the same, beside a change that does alter it.

    python examples/verify_rewrite.py [MODEL] [--quick]

MODEL is a directory with config.json, safetensors and a tokenizer; without one, all-MiniLM-L6-v2 where it is installed,
else a small random GPT-2. Everything is written to a temporary folder.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

import gaugekit as gk


def default_model(folder: Path) -> Path:
    """The installed sample model, or a random one where it is absent."""
    try:
        return gk.samples.minilm()
    except FileNotFoundError as absent:
        print(f"{absent}\nusing a random GPT-2 instead")
        GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4)).save_pretrained(folder / "random")
        return folder / "random"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer sentences")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.model or default_model(folder)
        has_tokenizer = (source / "tokenizer.json").is_file()
        text = gk.samples.sentences(8 if options.quick else 200) if has_tokenizer else None

        print(gk.inspect(source, text=text))
        gk.convert(source, folder / "fixed", [gk.symmetry.GaugeFix()])
        for dtype in ("float32", "bfloat16"):
            report = gk.verify(source, folder / "fixed", text=text, dtype=dtype)
            print(report)
            assert report["ok"], "an exact rewrite errs as the original does"

        changed = AutoModel.from_pretrained(source)  # what a real change looks like: one layer 1 % off
        name, weight = next((n, p) for n, p in changed.named_parameters() if ".0." in n and p.dim() == 2)
        weight.data.mul_(1.01)
        report = gk.verify(AutoModel.from_pretrained(source), changed, text=text)
        print(f"\n{name} made 1 % larger:\n{report}")
        assert not report["ok"]


if __name__ == "__main__":
    main()
