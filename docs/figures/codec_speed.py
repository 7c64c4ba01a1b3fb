"""Draws codec_speed.svg, docs/pack.md's picture: how fast coders of bf16 decode, and how much is left.

    python docs/figures/codec_speed.py

Measured on the spot on one thread, 8 MiB of normal numbers (BigSmall: 4), each into memory that it asks for itself: so
little that the C library hands out what was used before, for filling new pages takes longer than decoding into them.
Rivals that are not installed are not drawn. The bench extra has zstd and ZipNN; OpenZL and BigSmall are on PyPI.
"""

import math
import sys
import time
from html import escape
from pathlib import Path

import torch

from gaugekit.codec.tensors.blob import encode_bytes
from gaugekit.ops.rans import operator as rans

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import tensor_codecs
from run import machine

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 620, 330, 60, 30, 130, 50
SLOWEST, FASTEST, LEAST, MOST = 0.02, 30, 65, 80  # GB/s, percent
STYLE = """<style>text { font: 12px system-ui, "Segoe UI", Arial, sans-serif; fill: #566267; }
.name { fill: #1c2326; } .grid { stroke: #dde3e5; } .ours { fill: #0072b2; } .other { fill: #8d979b; }</style>"""


def speed(call, size: int) -> float:
    """GB/s, the best of what fits into two seconds."""
    best, stop = math.inf, time.perf_counter() + 2
    while time.perf_counter() < stop or best == math.inf:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def rivals(raw: bytes) -> dict[str, tuple[float, float]]:
    """By name (GB/s decoding, percent of the size left)."""
    coders = {"OpenZL, Huffman": tensor_codecs.openzl(), "OpenZL, FSE": tensor_codecs.openzl("Fse")}
    part = raw[: 1 << 22]
    coders["BigSmall"] = tensor_codecs.bigsmall(len(part) // 2)
    try:
        import zstandard

        level3 = zstandard.ZstdCompressor(level=3)
        coders["zstd -3"] = tensor_codecs.Codec(level3.compress, zstandard.ZstdDecompressor().decompress)
    except ImportError:
        pass
    try:
        import zipnn

        huffman = zipnn.ZipNN(bytearray_dtype="bfloat16", threads=1)
        coders["ZipNN"] = tensor_codecs.Codec(
            lambda raw: huffman.compress(bytes(bytearray(raw))), huffman.decompress
        )
    except ImportError:
        pass
    found = {}
    for name, coder in coders.items():
        if coder is None:
            continue
        data = part if name == "BigSmall" else raw
        coded = coder.encode(data)
        assert bytes(coder.decode(coded)) == data, name
        found[name] = (
            speed(lambda coder=coder, coded=coded: coder.decode(coded), len(data)),
            100 * len(coded) / len(data),
        )
    return found


def ours(tensor: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Into new memory each time, as the rivals."""
    found, count = {}, tensor.numel()
    for symbols in ("exponent", "exponent-and-mantissa"):
        blob = encode_bytes(tensor, symbols=symbols)
        decode = lambda blob=blob: rans.decode(blob, 0, count, torch.empty_like(tensor))  # noqa: E731
        found[f"gaugekit, {symbols}"] = (speed(decode, tensor.nbytes), 100 * blob.numel() / tensor.nbytes)
    return found


def drawing(points: dict[str, tuple[float, float]], where: str) -> str:
    def x(gigabytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(gigabytes / SLOWEST) / math.log(FASTEST / SLOWEST)

    def y(percent: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (percent - LEAST) / (MOST - LEAST)

    parts = []
    for tick in (0.05, 0.1, 0.5, 1, 5, 10):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in range(LEAST, MOST + 1, 5):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} %</text>')
    before, step = -math.inf, 0  # names of neighbours go down in steps
    for name, (gigabytes, percent) in sorted(points.items(), key=lambda item: item[1]):
        kind, to, at = "ours" if name.startswith("gaugekit") else "other", x(gigabytes), y(percent)
        step = step + 1 if percent < 70 and to - before < 130 else 0
        before = to if percent < 70 else before
        parts.append(f'<path class="grid" d="M{to:.1f} {at:.1f}v{12 + 17 * step}"/>')
        parts.append(f'<circle class="{kind}" cx="{to:.1f}" cy="{at:.1f}" r="5"/>')
        parts.append(f'<text class="name" x="{to:.1f}" y="{at + 20 + 17 * step:.1f}" text-anchor="middle">')
        parts.append(f"{escape(name)}</text>")
    label = f"decoded, GB/s, one thread, {escape(where)}: further right is faster, higher is smaller"
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 12}">{label}</text>')
    spoken = "; ".join(
        f"{name}: {speed:.2f} GB/s, {percent:.1f} %" for name, (speed, percent) in points.items()
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    )
    title = f"<title>Coders of bfloat16 weights: speed and size</title><desc>{escape(spoken)}</desc>"
    return (
        f'{head}{title}{STYLE}<rect width="100%" height="100%" rx="10" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    torch.set_num_threads(1)
    tensor = (torch.randn(4 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    points = rivals(tensor.view(torch.uint8).numpy().tobytes()) | ours(tensor)
    Path(__file__).with_suffix(".svg").write_text(
        drawing(points, machine("cpu").rpartition(",")[0]), encoding="utf-8"
    )
    for name, (gigabytes, percent) in points.items():
        print(f"{name}: {gigabytes:.2f} GB/s, {percent:.2f} %")


if __name__ == "__main__":
    main()
