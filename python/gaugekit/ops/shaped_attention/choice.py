"""Which core ``shaped_attention`` uses: static tables, read from dtypes, shapes and the kind of mask.

On CPUs our own kernel (``gaugekit::ragged_attention`` with one rank for all heads) was timed beside torch's attention,
queries and keys padded to the values' width, by kind of processor (docs/rank.md); where it was not, torch's stays. On
GPUs:

The rules follow an analysis of FLOPs and bytes on Hopper; none of them has been timed. A fused kernel saves passes over
memory, which counts while the sequence is short or the heads are narrow; for wide heads and long sequences the vendors'
attention kernels are ahead of any Triton kernel by more than the sweep of ``shaped_combine`` costs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gaugekit import _library
from gaugekit.ops import processor
from gaugekit.ops.shaped_combine.cuda import DTYPES, INSTALLED, WIDEST

FUSED = "fused"
FLEX = "flex"
TORCH = "torch"
RAGGED = "ragged"
FEWEST_QUERIES = 32  # the ragged core works on blocks of 48
_asked: list[str] = []  # innermost last
# torch's attention kernels in the order they are tried; the first that takes the call answers.
BACKENDS = {
    torch.bfloat16: ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    torch.float16: ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
    torch.float32: ("EFFICIENT_ATTENTION", "MATH"),
    torch.float64: ("MATH",),
}


@contextlib.contextmanager
def use_core(name: str) -> Iterator[None]:
    """Calls inside take the core ``name`` instead of the table's: "torch", "ragged", "fused" or "flex".

    "ragged" is the operator of ``gaugekit.ragged_attention``, one rank for all heads: C++ on CPUs, Triton on GPUs.
    "fused" is one Triton kernel on GPUs, elsewhere a composition that writes the softmax out. "flex" is torch's
    FlexAttention: compiled on GPUs; on CPUs torch's unfused form, without gradients. Enter it outside of a compiled
    function as well as inside. ValueError for another name.
    """
    if name not in (TORCH, RAGGED, FUSED, FLEX):
        raise ValueError(f"core: expected {TORCH!r}, {RAGGED!r}, {FUSED!r} or {FLEX!r}, got {name!r}")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def asked_core() -> str | None:
    """The core that ``use_core`` asks for here."""
    return _asked[-1] if _asked else None


class Taken(NamedTuple):
    """Calls that our kernel takes on a CPU: at least so many ``queries`` and ``keys``, keys at most ``ratio`` times as
    wide as values and neither wider than ``widest``; ``causal``: only under a causal mask of as many queries as keys.
    """

    queries: int
    ratio: float
    keys: int = 1
    widest: float = math.inf
    causal: bool = False


# By kind of processor and bytes of a number or dtype. Measured on a Xeon (Cascade Lake, AVX-512), taken over for AVX2;
# "pairs" on an AMD EPYC (Zen 4). "native" processors multiply 16-bit numbers themselves in another way: not measured.
FLOAT32, FLOAT16 = Taken(FEWEST_QUERIES, 0.75), Taken(FEWEST_QUERIES, 1)
CPU_CORES = {
    "avx2": {4: [FLOAT32], 8: [FLOAT32], 2: [FLOAT16]},
    "avx512": {4: [FLOAT32], 8: [FLOAT32], 2: [FLOAT16]},
    "native": {4: [FLOAT32], 8: [FLOAT32]},
    "pairs": {
        torch.float32: [Taken(96, 0.5, widest=256), Taken(128, 1, widest=256, causal=True)],
        torch.bfloat16: [Taken(40, 4, widest=256), Taken(1, 4, keys=128, widest=256)],
        torch.float16: [Taken(48, 4, widest=256)],
    },
}
NATIVE = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tile")


def cpu_core(
    dtype: torch.dtype, queries: int, keys: int, key_width: float, width: int, causal: bool = False
) -> str:
    """The core, "ragged" or "torch", of a call on a CPU where none is asked for.

    ``causal``: every query sees the keys up to its own of as many. Where our kernel was not measured to be as fast,
    torch's is taken.
    """
    table = CPU_CORES.get(_kind(), {})
    for rule in table.get(dtype, table.get(dtype.itemsize, ())):
        narrow = key_width <= rule.ratio * width and max(key_width, width) <= rule.widest
        if narrow and queries >= rule.queries and (causal or not rule.causal) and keys >= rule.keys:
            return RAGGED
    return TORCH


def _kind() -> str | None:
    """The kind of this processor, of those the kernel was timed on: "pairs" has AVX512-BF16 and VBMI2 and no other
    products of 16-bit numbers, "native" has others. None: another, or our kernel is not there."""
    return _processor() if _library.implementation("ragged_attention") else None


@functools.cache
def _processor() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return None
    own = torch.cpu.get_capabilities()
    native = {name for name in NATIVE if own.get(name)}
    if not native:
        return capability.lower()
    pairs = capability == "AVX512" and native == {"avx512_bf16"} and processor.flags() >= processor.PAIRS
    return "pairs" if pairs else "native"


# What torch.compiler.assume_constant_result would set, but that imports the compiler, and with it Triton.
_kind._dynamo_marked_constant = True


def gpu_core(
    dtype: torch.dtype, queries: int, keys: int, key_width: int, width: int, kind: str, terms: bool
) -> str:
    """The core, "fused" or "torch", of a call on a GPU where none is asked for.

    ``kind`` is what ``shaped_attention_core.mask_kind`` says; ``terms``: whether any gain is given.
    """
    if not INSTALLED or dtype not in DTYPES or max(key_width, width) > WIDEST:
        return "torch"
    if kind in (
        "keys",
        "blocks",
        "sequences",
    ):  # torch would need a mask array, and its fastest kernels take none
        return FUSED
    if not terms and key_width >= width:  # plain attention: nothing is there to fuse
        return "torch"
    if dtype == torch.float32:
        return FUSED if max(key_width, width) <= 128 else "torch"
    if 4 * queries < keys:  # a few queries on a long cache: torch splits the keys among programs
        return "torch"
    return FUSED if width <= 64 or key_width < width or keys <= 1024 else "torch"
