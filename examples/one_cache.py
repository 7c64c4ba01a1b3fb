"""Generates with one cached tensor a layer in place of keys and values: the same tokens, half of the bytes.

    python examples/one_cache.py
    python examples/one_cache.py --quick              # a smaller model, fewer tokens
    python examples/one_cache.py --model DIR          # your GPT-2 or OPT

``gaugekit.fuse(model, cache="x")`` lets the layers of a transformers model keep their input alone, where keys and
values can both be read off it: multi-head attention without rotary positions. Needs gaugekit[hf].
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import gaugekit as gk

GPT2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 2048, "vocab_size": 8192}
QUICK = {"n_embd": 192, "n_head": 6, "n_layer": 3, "n_positions": 256, "vocab_size": 512}


def drawn(sizes: dict[str, int]) -> PreTrainedModel:
    """A model of random weights, so wide that its attention is not uniform."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, int, float]:
    """The tokens, the bytes of the cache behind them, and tokens a second after the prompt."""
    name = "cache" if "cache" in model(prompt[:, :1]) else "past_key_values"
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    cache = model.generate(prompt, max_new_tokens=1, **options)[name]
    ids, begin = torch.cat([prompt, prompt[:, :1]], 1), time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, **options, **{name: cache})
    seconds = time.perf_counter() - begin
    layers = out[name].layers
    size = sum(x.shape[0] * layer.get_seq_length() * x.shape[1] * x.shape[3] * x.element_size()
               for layer in layers for x in (layer.keys, layer.values))  # fmt: skip
    return out.sequences, size, len(prompt) * tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", metavar="DIR", help="a model directory (otherwise random weights of GPT-2's shape)"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer tokens")
    arguments = parser.parse_args()

    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    else:
        model = drawn(QUICK if arguments.quick else GPT2)
    model = model.eval()
    rows, tokens = (96, 24) if arguments.quick else (900, 64)
    prompt = torch.randint(3, model.config.vocab_size, (4, rows))

    gk.fuse(model, gauge=False)  # the same attention, with keys and values
    expected, before, speed = generated(model, prompt, tokens)
    print(f"keys and values: {before / 1e6:.2f} MB of cache, {speed:.0f} tokens a second")
    gk.unfuse(model)

    print(gk.fuse(model, cache="x"))
    sequences, after, speed = generated(model, prompt, tokens)
    print(f"inputs alone:    {after / 1e6:.2f} MB of cache, {speed:.0f} tokens a second")
    if after:
        print(f"{before / after:.2f} times fewer bytes; the same tokens: {torch.equal(sequences, expected)}")


if __name__ == "__main__":
    main()
