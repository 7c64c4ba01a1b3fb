"""Trains a small model without value and output matrices (SAS), serves it, and asks it several things at once.

    python examples/serve_sas.py
    python examples/serve_sas.py --quick      # fewer steps: it recites less well

Requests run together (continuous batching): keys and inputs of all of them stand in the pages of one cache. The same
from a terminal: gaugekit serve DIR --continuous-batching -- --cb-num-blocks 64. Needs gaugekit[serving].
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gaugekit import serving
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
from gaugekit.nn import parameter_groups

TEXT = (
    "a gauge is a freedom nobody can observe. take it away, and nothing changes but the bytes. "
    "what two models answer alike is one model, and the smaller of its descriptions will do. "
)
PROMPTS = ("a gauge is", "take it away, and", "what two models", "the smaller of its")
ROWS = 64


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter of the text."""
    ids = {"[PAD]": 0, **{letter: 1 + index for index, letter in enumerate(sorted(set(TEXT)))}}
    core = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[PAD]")


def train(words: PreTrainedTokenizerFast, steps: int) -> SASForCausalLM:
    torch.manual_seed(0)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    model = SASForCausalLM(
        SASConfig(vocab_size=len(words), n_layer=2, n_embd=64, n_head=4, rope=True, **ends)
    )
    text = torch.tensor(words(TEXT * 3)["input_ids"])
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - ROWS, (8, 1))
        ids = text[starts + torch.arange(ROWS)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained {steps} steps: loss {loss:.3f}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, shorter answers")
    arguments = parser.parse_args()
    disable_progress_bar()
    words = tokenizer()
    model = train(words, 60 if arguments.quick else 400)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        # by itself the paged cache of a CPU takes more than half of its memory
        pages = ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
        with serving.running(Path(folder), continuous_batching=True, more=pages) as address:
            client = OpenAI(base_url=f"{address}/v1", api_key="none")

            def ask(prompt: str) -> str:
                said = client.completions.create(
                    model=folder, prompt=prompt, max_tokens=16 if arguments.quick else 48, temperature=0
                )
                return said.choices[0].text

            with ThreadPoolExecutor() as threads:
                for prompt, said in zip(PROMPTS, threads.map(ask, PROMPTS), strict=True):
                    print(f"{prompt!r} → {said!r}")


if __name__ == "__main__":
    main()
