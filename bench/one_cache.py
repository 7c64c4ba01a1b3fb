"""Decoding steps of a model of GPT-2's width, with keys and values cached and with its inputs alone.

    python bench/one_cache.py                                 # context 4,096, batch 4, 2 layers, float32
    python bench/one_cache.py --context 1024 --dtype bfloat16 --layers 12

One thread. What is timed is the processor's time, which waits for other processes do not enter; of each model the
fastest of ``--steps`` steps, taken in turns, behind a prompt as long as the context.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import gaugekit as gk

NAMES = ("keys and values, torch", "keys and values, gaugekit", "inputs")


def models(context: int, layers: int, dtype: torch.dtype) -> dict[str, GPT2LMHeadModel]:
    torch.manual_seed(0)
    sizes = {"n_embd": 768, "n_head": 12, "n_layer": layers, "n_positions": context, "vocab_size": 512}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval().to(dtype)
    ours, inputs = copy.deepcopy(plain), copy.deepcopy(plain)
    gk.fuse(ours, gauge=False)
    report = gk.fuse(inputs, cache="x")
    print(f"cache: {dict(report.lines)['cache']}")
    return dict(zip(NAMES, (plain, ours, inputs), strict=True))


@torch.inference_mode()
def step_ms(
    timed: dict[str, GPT2LMHeadModel], kind: str, context: int, batch: int, steps: int
) -> dict[str, float]:
    """The fastest step of each model, in milliseconds of the processor."""
    ids = torch.randint(0, 512, (batch, context - steps))
    name = "cache" if "cache" in next(iter(timed.values()))(ids[:, :1]) else "past_key_values"
    caches, times = {}, {key: [] for key in timed}
    for key, model in timed.items():
        if kind == "dynamic":
            caches[key] = DynamicCache(config=model.config)
        else:
            caches[key] = StaticCache(config=model.config, max_cache_len=context)
        model(ids, logits_to_keep=1, **{name: caches[key]})
    for step in range(steps):
        for key, model in timed.items():
            begin = time.process_time()
            model(ids[:, step : step + 1], **{name: caches[key]})
            times[key].append(1000 * (time.process_time() - begin))
    return {key: min(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timed = models(arguments.context, arguments.layers, getattr(torch, arguments.dtype))
    for kind in ("dynamic", "static"):
        times = step_ms(timed, kind, arguments.context, arguments.batch, arguments.steps)
        for key, value in times.items():
            rate = 1000 * arguments.batch / value
            print(f"{kind} cache, {key}: {value:.0f} ms a step, {rate:.1f} tokens a second")


if __name__ == "__main__":
    main()
