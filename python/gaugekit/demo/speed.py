"""What the demo times: coding weights beside zstd, and a value-free attention sub-block beside a standard one.

Rivals take turns inside one run, so that whatever else the machine does hits all of them; reported are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec import decode, encode
from gaugekit.ops.shaped_attention.operator import shaped_attention

ZSTD_LEVEL = 3
Progress = Callable[[int, int], None] | None


def interleaved(
    calls: dict[Hashable, Callable[[], object]], seconds: float, progress: Progress
) -> dict[Hashable, list[float]]:
    """Seconds of each call, round after round, for about ``seconds``: at least one round, at most 25.

    Every call runs once untimed first, unless that alone takes a third of the time there is.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    warm = False
    while len(next(iter(times.values()))) < 25:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - begin
        if progress is not None:
            progress(min(round(1000 * spent / seconds), 1000), 1000)
        if not warm and spent < seconds / 3:
            times = {name: [] for name in calls}
        elif spent >= seconds:
            break
        warm = True
    return times


def coding(source: Path, seconds: float, progress: Progress = None) -> dict:
    """GB/s (10⁹ bytes of weights) of coding and decoding every weight tensor of the directory ``source``.

    In memory, each on one thread, a fresh result each time: the coders are compared, not the disk. Both carry
    checksums. Where zstandard is not installed its row says so.
    """
    checkpoint = Checkpoint(source)
    tensors = [tensor for name in checkpoint.names() if (tensor := checkpoint.read(name)).is_floating_point()]
    raw = [tensor.flatten().view(torch.uint8).numpy() for tensor in tensors]
    size = sum(array.nbytes for array in raw)
    zstd = f"zstd, level {ZSTD_LEVEL}"
    coders = {"gaugekit": (encode, decode, tensors)}
    found: dict[str, dict] = {"gaugekit": {}, zstd: {}}
    try:
        import zstandard
    except ImportError:
        found[zstd]["absent"] = "zstandard is not installed (pip install gaugekit[demo])"
    else:
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        coders[zstd] = (compressor.compress, zstandard.ZstdDecompressor().decompress, raw)

    coded: dict[str, list] = {}
    calls = {}
    for name, (coder, decoder, items) in coders.items():

        def pack(name=name, coder=coder, items=items) -> None:
            coded[name] = [coder(item) for item in items]

        def unpack(name=name, decoder=decoder) -> None:
            for blob in coded[name]:
                decoder(blob)

        calls[name, "pack"], calls[name, "unpack"] = pack, unpack
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # zstd has one, too
    try:
        times = interleaved(calls, seconds, progress)
    finally:
        torch.set_num_threads(threads)
    for (name, verb), measured in times.items():
        found[name][f"{verb}_gb_s"] = size / statistics.median(measured) / 1e9
        found[name]["ratio"] = sum(map(len, coded[name])) / size
    return {"bytes": size, "rounds": len(times["gaugekit", "pack"]), "coders": found}


def attention(
    seconds: float,
    progress: Progress = None,
    *,
    batch: int = 4,
    tokens: int = 512,
    width: int = 768,
    heads: int = 12,
) -> dict:
    """Milliseconds of two attention sub-blocks on the same input [B, T, D], float32, forward only.

    Standard: one fused projection to queries, keys and values, torch's SDPA, the output projection. Value-free
    (He & Hofmann, arXiv:2311.01906, simplified attention sub-block): one fused projection to queries and keys;
    the values are the input's own slices and there is no output projection, so α V + β A − γ C is all.
    ``ratio`` is standard over value-free, the median of interleaved pairs.
    """
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / width**0.5

    x = torch.randn(batch, tokens, width, generator=draw)
    to_qkv, to_qk, to_out = weight(3 * width, width), weight(2 * width, width), weight(width, width)
    alpha, beta, gamma = (torch.rand(heads, generator=draw) for _ in range(3))

    def split(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(batch, tokens, heads, width // heads).transpose(1, 2)

    def join(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).reshape(batch, tokens, width)

    def standard() -> torch.Tensor:
        q, k, v = map(split, linear(x, to_qkv).chunk(3, dim=-1))
        return linear(join(scaled_dot_product_attention(q, k, v)), to_out)

    def value_free() -> torch.Tensor:
        q, k = map(split, linear(x, to_qk).chunk(2, dim=-1))
        return join(shaped_attention(q, k, split(x), alpha=alpha, beta=beta, gamma=gamma))

    with torch.no_grad():
        times = interleaved({"standard": standard, "value_free": value_free}, seconds, progress)
    pairs = zip(times["standard"], times["value_free"], strict=True)
    return {
        "batch": batch,
        "tokens": tokens,
        "width": width,
        "heads": heads,
        "rounds": len(times["standard"]),
        "standard_ms": 1e3 * statistics.median(times["standard"]),
        "value_free_ms": 1e3 * statistics.median(times["value_free"]),
        "ratio": statistics.median(a / b for a, b in pairs),
    }
