"""Which kernel ``single_cache_attention`` takes on a GPU: Triton's, or CUDA's where it is asked for and takes the call.

CUDA's reads a row of the cache once for all heads, by bulk copies of compute capability 9.0. No GPU has run it yet, so
nothing takes it by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gaugekit import _library

TRITON, CUDA = "triton", "cuda"
CAPABILITY = (9, 0)
QUERY_ROWS = 16  # heads of a group times queries: what one product on tensor cores takes
WIDEST, WIDEST_TURNED = 2048, 512  # channels; of keys that are turned
MOST_KEYS, MOST_GROUPS = 1 << 29, 65535  # rows of a sequence; sequences times groups
STEP = 16  # channels of one product; slices and angles are whole steps, and a row is pairs of them
_asked: list[str] = []  # innermost last


@contextlib.contextmanager
def use_core(name: str) -> Iterator[None]:
    """Calls of ``single_cache_attention`` on a GPU inside take the kernel ``name``, "triton" (the default) or "cuda".

    What "cuda" does not take goes to Triton's: ``refusal`` says why. ValueError for another name.
    """
    if name not in (TRITON, CUDA):
        raise ValueError(f"core: expected {TRITON!r} or {CUDA!r}, got {name!r}")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def asked_core() -> str:
    return _asked[-1] if _asked else TRITON


def here(device: torch.device) -> bool:
    """Whether CUDA's kernel is in the binary and can run on ``device``."""
    built = _library.implementation("single_cache_attention_rows", "CUDA")
    return built and torch.cuda.get_device_capability(device) == CAPABILITY


def refusal(
    q: Tensor, cache: Tensor, slices: bool, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None,
    key_gain: Tensor | None, cos: Tensor | None, sin: Tensor | None, causal: bool, window: int | None,
    query_start: Tensor | None, key_lengths: Tensor | None, block_table: Tensor | None, scale: float,
) -> str | None:  # fmt: skip
    """Why CUDA's kernel does not take a call; None if it does."""
    (batch, heads, queries, width), (groups, page) = q.shape, cache.shape[1:3]
    repeats, keys = heads // groups, page if block_table is None else page * block_table.shape[1]
    values = width // repeats if slices else width
    pairs = 0 if cos is None else cos.shape[1]
    means = queries if gamma is not None else 0
    sliced = values < width
    reasons = {
        "float32 and float64": q.dtype not in (torch.bfloat16, torch.float16),
        "nothing to do": not (q.numel() and cache.numel() and keys),
        f"a width that is no multiple of {2 * STEP}": bool(width % (2 * STEP)),
        f"more than {WIDEST} channels": width > WIDEST,
        f"more than {QUERY_ROWS} heads of a group times queries": repeats * queries > QUERY_ROWS,
        "gamma over whole rows, with no query row left for it": not sliced
        and repeats * queries + means > QUERY_ROWS,
        "gamma over slices, with many queries or turned keys": sliced
        and bool(means)
        and (queries > QUERY_ROWS // 2 or pairs > 0),
        f"slices of a width that is no multiple of {STEP}": sliced and bool(values % STEP),
        f"angles of a number of pairs that is no multiple of {STEP}": bool(pairs % STEP),
        f"turned keys of more than {WIDEST_TURNED} channels": pairs > 0 and width > WIDEST_TURNED,
        "too many rows or sequences": keys > MOST_KEYS or batch * groups > MOST_GROUPS,
        "queries or rows that do not lie as copies need them": not (_lies(q, 2) and _lies(cache, 8)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _lies(x: Tensor, multiple: int) -> bool:
    """Neighbouring channels, each row at a multiple of so many numbers."""
    steps = [step for size, step in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return (
        x.stride(3) == 1
        and not any(step % multiple for step in steps)
        and x.data_ptr() % (multiple * x.element_size()) == 0
    )
