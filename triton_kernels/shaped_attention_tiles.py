"""Tiles of the attention kernels, and the variants of a kernel that stand beside what is launched unless asked."""

import contextlib

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# (part, bytes of an element, widest of K and V) -> queries and keys of a tile, warps, stages. Triton 3.6 compiles them
# for sm_90 without spills; none has been timed. Float32 products run on the ordinary cores, from registers.
TILES = {
    ("forward", 2, 64): (128, 64, 8, 3),
    ("forward", 2, 128): (128, 64, 8, 3),
    ("forward", 2, 256): (64, 64, 8, 2),
    ("forward", 4, 64): (32, 32, 4, 1),
    ("forward", 4, 128): (32, 16, 8, 1),
    ("forward", 4, 256): (32, 16, 8, 1),
    ("forward, window", 2, 128): (64, 64, 8, 3),
    ("keys", 2, 64): (64, 128, 8, 2),
    ("keys", 2, 128): (64, 64, 8, 2),
    ("keys", 2, 256): (16, 64, 8, 2),
    ("keys", 4, 64): (32, 32, 8, 1),
    ("keys", 4, 128): (16, 32, 8, 1),
    ("keys", 4, 256): (16, 16, 8, 1),
    ("keys, groups", 2, 128): (32, 64, 8, 2),
    ("keys, groups", 2, 256): (32, 32, 8, 2),
    ("keys, groups", 4, 64): (16, 32, 4, 1),
    ("queries", 2, 64): (128, 64, 8, 2),
    ("queries", 2, 128): (128, 64, 8, 2),
    ("queries", 2, 256): (64, 32, 8, 2),
    ("queries", 4, 64): (32, 32, 8, 1),
    ("queries", 4, 128): (16, 16, 8, 2),
    ("queries", 4, 256): (16, 16, 8, 2),
    ("forward, small", 2, 256): (64, 32, 8, 2),
    ("queries, small", 2, 256): (32, 32, 8, 2),
}


def tiles(part: str, key_width: int, width: int, dtype: torch.dtype, windowed: bool, grouped: bool,
          little_memory: bool = False) -> dict:  # fmt: skip
    """The tile of ``part`` (forward, keys, queries): a pure function of its arguments.

    ``little_memory``: what ``small`` says of the card; every tile then fits 99 KiB of shared memory.
    """
    block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (key_width, width))
    key = (dtype.itemsize, max(64, block_k, block_v))
    m, n, warps, stages = TILES[(part, *key)]
    for applies, kind in ((windowed, "window"), (grouped, "groups"), (little_memory, "small")):
        if applies:
            m, n, warps, stages = TILES.get((f"{part}, {kind}", *key), (m, n, warps, stages))
    sizes = {"BLOCK_K": block_k, "BLOCK_V": block_v, "BLOCK_M": m, "BLOCK_N": n}
    return sizes | {"num_warps": warps, "num_stages": stages}


# Name -> part -> what differs from the plain launch; a part that is not named is plain. None has been timed; the
# default is "plain" until a GPU has chosen. FOLD: the scale goes into the exponent, one multiply-add a score. SPLIT:
# only blocks that the mask cuts pay for it. descriptors: K, V (or Q, dO, LSE, δ) come by the tensor memory accelerator
# of sm_90, which frees the registers of their addresses. tiles: for 16-bit numbers and a widest of K and V; ``maxnreg``
# so that three blocks of four warps fit the registers of an SM.
VARIANTS = {
    "plain": {},
    "folded": {"forward": {"FOLD": True}},
    "descriptors": {
        "forward": {"FOLD": True, "descriptors": True},
        "keys": {"SPLIT": True, "descriptors": True, "tiles": {128: (64, 128, 8, 2)}},
        "queries": {"descriptors": True},
    },
    "small blocks": {
        "forward": {
            "FOLD": True,
            "descriptors": True,
            "tiles": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2)},
            "maxnreg": {64: 168},
        },
        "keys": {"SPLIT": True, "descriptors": True, "tiles": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)}},
        "queries": {"descriptors": True, "tiles": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)}},
    },
}
_asked = ["plain"]  # innermost last


@contextlib.contextmanager
def use_variant(name: str):
    """Fused attention inside launches the variant ``name`` of VARIANTS; for benches and tests.

    A call that the variant cannot serve raises ValueError. ValueError for another name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant: expected one of {list(VARIANTS)}, got {name!r}")
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def varied(part: str, tile: dict, dtype: torch.dtype, scale: float) -> tuple[dict, bool]:
    """``tile`` as the variant asked for here has it, and whether its operands come by descriptors."""
    options = VARIANTS[_asked[-1]].get(part, {})
    if options.get("FOLD") and scale <= 0:
        raise ValueError(f"variant {_asked[-1]!r}: expected scale > 0, got {scale}")
    tile = tile | {name: True for name in ("FOLD", "SPLIT") if options.get(name)}
    widest = max(64, tile["BLOCK_K"], tile["BLOCK_V"])
    if dtype.itemsize == 2:
        if widest in options.get("tiles", {}):
            names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
            tile |= dict(zip(names, options["tiles"][widest], strict=True))
        if widest in options.get("maxnreg", {}):
            tile["maxnreg"] = options["maxnreg"][widest]
    return tile, options.get("descriptors", False)


def described(mask, **tensors) -> dict:
    """Descriptors {name: TensorDescriptor} of (tensor, its box) pairs; ValueError where the hardware takes none."""

    def refuse(expected: str, given: str):
        raise ValueError(f"variant {_asked[-1]!r}: expected {expected}, got {given}")

    if mask.tensors["BOUNDS"] is not None or mask.tensors["LENGTHS"] is not None:
        refuse("neither key_lengths nor cu_seqlens, whose ends a descriptor does not know", "one of them")
    for name, (x, _) in tensors.items():
        size, strides = x.element_size(), x.stride()
        if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] < 9:
            refuse("a GPU of compute capability 9.0 or newer", torch.cuda.get_device_name(x.device))
        if x.dim() == 4 and size != 2:
            refuse("16-bit operands", str(x.dtype))
        aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides[:-1])
        if strides[-1] != 1 or not aligned:
            refuse(
                f"{name} in rows without gaps that start at multiples of 16 bytes", f"strides {list(strides)}"
            )
    return {name: TensorDescriptor.from_tensor(x, box) for name, (x, box) in tensors.items()}
