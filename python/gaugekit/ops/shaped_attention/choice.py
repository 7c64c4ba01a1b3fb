"""Which core ``shaped_attention`` uses: static tables, read from dtypes, shapes and the kind of mask.

On CPUs our own kernel (``gaugekit::ragged_attention`` with one rank for all heads) was timed beside torch's attention,
queries and keys padded to the values' width (docs/rank.md); where it was not, torch's stays. On GPUs:

The rules follow an analysis of FLOPs and bytes on Hopper; none of them has been timed. A fused kernel saves passes over
memory, which counts while the sequence is short or the heads are narrow; for wide heads and long sequences the vendors'
attention kernels are ahead of any Triton kernel by more than the sweep of ``shaped_combine`` costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gaugekit import _library
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


def cpu_core(dtype: torch.dtype, queries: int, key_width: float, width: int) -> str:
    """The core, "ragged" or "torch", of a call on a CPU where none is asked for.

    Torch's own kernel is as fast where keys are about as wide as the values; with 16-bit numbers it is not.
    """
    half = dtype.itemsize == 2
    narrow = key_width <= width if half else 4 * key_width <= 3 * width
    return RAGGED if queries >= FEWEST_QUERIES and narrow and _timed_here(half) else TORCH


def _timed_here(half: bool) -> bool:
    """Whether this processor is of the kind the kernel was timed on: AVX2 or AVX-512, and for 16-bit numbers no
    instructions of their own, which torch's attention would use."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    own = torch.cpu.get_capabilities()
    native = any(own.get(name) for name in ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tile"))
    return not (half and native) and _library.implementation("ragged_attention")


# What torch.compiler.assume_constant_result would set, but that imports the compiler, and with it Triton.
_timed_here._dynamo_marked_constant = True


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
