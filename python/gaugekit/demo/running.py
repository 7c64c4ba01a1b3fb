"""What the demo runs with weights that stay packed in memory: bytes held, every weight compared, tokens a second.

The plain and the packed model take turns, step by step, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from gaugekit.hf import loading
from gaugekit.text.sentences import sentences
from gaugekit.verbs.fuse import fuse
from gaugekit.verbs.wide_products import wide_products

Progress = Callable[[int, int], None] | None
READ_TOKENS = 128  # of the perplexity's text
PROMPT_TOKENS, MOST_TOKENS = 16, 48


def encoder(
    name: str, directory: Path, strings: list[str], seconds: float, progress: Progress = None
) -> dict:
    """The encoder in ``directory``, bfloat16, reading one of ``strings`` after the other for about ``seconds``.

    Fields: ``model``, ``work``, ``bytes_before``, ``bytes_after`` (parameters and buffers), ``memory_ratio``,
    ``bit_exact`` (every packed matrix, decoded, is the plain one bit for bit), ``plain_tokens_s``,
    ``packed_tokens_s`` and ``speed_ratio`` (packed over plain, the median of interleaved pairs).
    """
    from transformers import AutoModel, AutoTokenizer

    with loading.quiet():
        model = AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    places = model.config.max_position_embeddings
    rows = [tokenizer(string, return_tensors="pt", truncation=True, max_length=places) for string in strings]

    def read(model: nn.Module) -> Iterator[int]:
        while True:
            for row in rows:
                model(**row)
                yield row["input_ids"].numel()

    fields, models = _packed(model)
    with torch.no_grad():
        speeds = _in_turns({how: read(model) for how, model in models.items()}, seconds, 1000, progress)
    return {"model": name, "work": "reading one sentence at a time", **fields, **speeds}


def language_model(name: str, directory: Path, seconds: float, progress: Progress = None) -> dict:
    """The decoder in ``directory``, bfloat16, writing on from a prompt, greedily, for about ``seconds``.

    The fields of ``encoder``, and ``plain_perplexity`` and ``packed_perplexity`` of the first ``perplexity_tokens``
    tokens of Python's language reference, ``new_tokens`` and ``same_tokens``: how many tokens each model wrote, and
    how many of them agree before the first that differs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading.quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(" ".join(sentences(40)), return_tensors="pt")["input_ids"]
    places = getattr(model.config, "max_position_embeddings", None) or READ_TOKENS
    ids = ids[:, : min(READ_TOKENS, places)]
    fields, models = _packed(model)
    texts: dict[str, list[int]] = {how: [] for how in models}

    def write(how: str) -> Iterator[int]:
        output = models[how](ids[:, :PROMPT_TOKENS], use_cache=True)
        while True:
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            texts[how].append(token.item())
            name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24's word, and 5.23's
            output = models[how](token, **{name: output[name]}, use_cache=True)
            yield 1

    with torch.no_grad():
        perplexities = {f"{how}_perplexity": _perplexity(model, ids) for how, model in models.items()}
        most = min(MOST_TOKENS, places - PROMPT_TOKENS - 2)
        speeds = _in_turns({how: write(how) for how in models}, seconds, most, progress)
    pairs = list(zip(texts["plain"], texts["packed"], strict=True))
    same = next((place for place, (plain, packed) in enumerate(pairs) if plain != packed), len(pairs))
    return {
        "model": name,
        "work": "writing one token at a time",
        **fields,
        **perplexities,
        "perplexity_tokens": ids.numel() - 1,
        **speeds,
        "new_tokens": len(pairs),
        "same_tokens": same,
    }


def _packed(model: nn.Module) -> tuple[dict, dict[str, nn.Module]]:
    """What packing a copy of ``model`` in memory gives, and both models."""
    packed = copy.deepcopy(model)
    report = fuse(packed, packed=True, attention=False)
    before, after = report["bytes_before"], report["bytes_after"]
    fields = {
        "bytes_before": before,
        "bytes_after": after,
        "memory_ratio": after / before,
        "bit_exact": _same_bits(model, packed),
    }
    return fields, {"plain": model, "packed": packed}


def _same_bits(plain: nn.Module, packed: nn.Module) -> bool:
    """Whether every number of ``plain`` stands in the state of ``packed``, which decodes what it holds packed."""
    state = packed.state_dict()
    return all(
        torch.equal(tensor.contiguous().view(torch.uint8), state[name].contiguous().view(torch.uint8))
        for name, tensor in plain.state_dict().items()
        if tensor.numel()
    )


def _perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    with wide_products(model.dtype):
        return math.exp(model(ids, labels=ids).loss.item())


def _in_turns(steps: dict[str, Iterator[int]], seconds: float, most: int, progress: Progress) -> dict:
    """Tokens a second of the plain and the packed model: each takes one step after the other, in turning order.

    A first step each is not timed. For about ``seconds``, at least three rounds and at most ``most``.
    """
    rates: dict[str, list[float]] = {how: [] for how in steps}
    for step in steps.values():
        next(step)
    order, begin, spent = list(steps), time.perf_counter(), 0.0
    while len(rates["plain"]) < most and (spent < seconds or len(rates["plain"]) < 3):
        for how in order:
            start = time.perf_counter()
            count = next(steps[how])
            rates[how].append(count / (time.perf_counter() - start))
        order.reverse()
        spent = time.perf_counter() - begin
        if progress is not None:
            progress(min(round(1000 * spent / seconds), 1000), 1000)
    pairs = zip(rates["packed"], rates["plain"], strict=True)
    return {
        **{f"{how}_tokens_s": statistics.median(rates[how]) for how in steps},
        "speed_ratio": statistics.median(packed / plain for packed, plain in pairs),
        "rounds": len(rates["plain"]),
    }
