"""A language model with resident packed weights beside the plain one: tokens a second, prompts, memory.

    python bench/resident.py                      # SmolLM2, bfloat16, one thread and two
    python bench/resident.py MODEL --threads 2 --save

Both models take turns, in turning order. ``tokens a second`` is that of the tokens after the first, one row of x a
product; ``prefill`` the time of one forward pass over ``--prompt`` tokens (256). ``ratio`` is the packed model's speed
over the plain one's, the median of rounds: above 1 it is faster. Packed weights are the plain ones, bit for bit, but
the sums of a product may have another order than torch's, so that a near tie parts the texts: ``same`` says.
SmolLM2's weights were 4-bit once, so that its memory is not that of a trained model; its speed is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

import gaugekit as gk
from documentation import learnt_and_measured
from gaugekit import samples
from gaugekit.checkpoint.resident import held_bytes
from gaugekit.hf import loading
from run import commit, machine, save


def generate(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """The tokens after ``ids``, and seconds for each after the first: what more than one take longer than one."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    between = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    end = time.perf_counter()
    return out[0, ids.shape[1] :].tolist(), ((end - between) - (between - begin)) / (tokens - 1)


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one pass."""
    begin = time.perf_counter()
    model(ids, logits_to_keep=1)
    return time.perf_counter() - begin


def rows_of(models: dict, ids: torch.Tensor, prompt: int, tokens: int, rounds: int) -> list[dict]:
    """A row for tokens and one for prompts, at torch's number of threads."""
    seconds = {kind: {name: [] for name in models} for kind in ("tokens", "prefill")}
    texts, order = [], list(models)
    for _ in range(rounds):
        for name in order:
            text, each = generate(models[name], ids[:, :16], tokens)
            texts.append(text)
            seconds["tokens"][name].append(each)
            seconds["prefill"][name].append(min(prefill(models[name], ids[:, :prompt]) for _ in range(3)))
        order.reverse()
    rows = []
    for kind, label in (
        ("tokens", "1 row: tokens after the first"),
        ("prefill", f"prefill of {prompt} tokens"),
    ):
        both = seconds[kind]
        ratio = statistics.median(a / b for a, b in zip(both["plain"], both["packed"], strict=True))
        p20, *_, p80 = (1e3 * part for part in statistics.quantiles(both["packed"], n=5))
        rows.append({
            "label": label, "median_ms": 1e3 * statistics.median(both["packed"]), "p20_ms": p20, "p80_ms": p80,
            "share_of_peak": None, "peak_bytes": held_bytes(models["packed"]), "baseline": "plain",
            "baseline_ms": 1e3 * statistics.median(both["plain"]), "ratio": ratio, "without_us": ratio,
            "same": all(text == texts[0] for text in texts), "rounds": rounds,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    options = parser.parse_args()
    for name in ("tokens", "rounds"):
        if getattr(options, name) < 2:
            parser.error(f"--{name}: expected 2 or more, got {getattr(options, name)}")
    source = options.model or samples.smollm2()
    plain = loading.model(source, torch.bfloat16)
    packed = copy.deepcopy(plain)
    gk.fuse(packed, packed=True, attention=False)
    models = {"plain": plain, "packed": packed}
    memory = {f"{name}_bytes": held_bytes(model) for name, model in models.items()}
    tokenizer = loading.tokenizer(source)
    ids = torch.tensor(tokenizer(learnt_and_measured()[1][: 8 * options.prompt])["input_ids"])[None]
    where = {"op": "resident", "shape": source.name, "dtype": "bfloat16", "device": "cpu"} | memory
    where |= {"machine": machine("cpu"), "commit": commit()}
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows = rows_of(models, ids, options.prompt, options.tokens, options.rounds)
        rows = [where | row | {"threads": threads} for row in rows]
        for row in rows:
            print(json.dumps(row), flush=True)
        if options.save:
            save(rows, f"resident-{source.name}", "cpu")


if __name__ == "__main__":
    main()
