"""The attention sub-block of a simplified transformer (no value and no output projection) beside

the standard block (four projections), the bare minimum (two projections and torch's attention, nothing else: no
value-free block can be faster) and the same mathematics in plain torch under torch.compile, cumulative sum and all.
"""

import shutil

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

import gaugekit as gk
from gaugekit.reference.shaped_attention import shaped_attention as reference
from registry import Case, benchmark, own_shape

HEADS = 12


def heads(x, count):
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def ours(x, query, key, alpha, beta, gamma):
    q, k, v = (heads(y, len(alpha)) for y in (linear(x, query), linear(x, key), x))
    return joined(gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True))


def plain(x, query, key, alpha, beta, gamma):
    q, k, v = (heads(y, len(alpha)) for y in (linear(x, query), linear(x, key), x))
    a = scaled_dot_product_attention(q, k, v, is_causal=True)
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
    mean = v.float().cumsum(2) / count[:, None]
    alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
    return joined((beta * a.float() + alpha * v.float() - gamma * mean).to(x.dtype))


def bare(count):
    def call(x, query, key):
        q, k, v = (heads(y, count) for y in (linear(x, query), linear(x, key), x))
        return joined(scaled_dot_product_attention(q, k, v, is_causal=True))

    return call


def standard(count):
    def call(x, query, key, value, output):
        q, k, v = (heads(linear(x, weight), count) for weight in (query, key, value))
        return linear(joined(scaled_dot_product_attention(q, k, v, is_causal=True)), output)

    return call


def both_ways(function, operands, weight):
    def call():
        return torch.autograd.grad(function(*operands), operands, weight)

    return call


def forward(function, operands):
    def call():
        with torch.no_grad():
            return function(*operands)

    return call


def check(operands):
    """Our block against float64, beside what plain torch makes of it in the same dtype."""

    def call():
        x, query, key, *gains = (y.detach().double().cpu() for y in operands)
        q, k, v = (heads(y, len(gains[0])) for y in (linear(x, query), linear(x, key), x))
        exact = joined(
            reference(q, k, v, **dict(zip(("alpha", "beta", "gamma"), gains, strict=True)), causal=True)
        )
        found, naive = (forward(f, operands)().double().cpu() for f in (ours, plain))
        error, allowed = (found - exact).abs().max(), 2 * (naive - exact).abs().max()
        assert error <= allowed, f"error {error:.2e}, plain torch's {allowed / 2:.2e}"

    return call


def sub_block(batch, length, width, count, dtype, device, threads=None):
    """The sub-block forward, and both ways."""
    x = torch.randn(batch, length, width, device=device).to(dtype)
    weights = [(torch.randn(width, width, device=device) / width**0.5).to(dtype) for _ in range(4)]
    gains = [torch.ones(count, device=device) for _ in range(3)]
    operands = [x, *weights[:2], *gains]
    wanted = [y.clone().requires_grad_() for y in [x, *weights, *gains]]
    block, four = [*wanted[:3], *wanted[5:]], wanted[:5]
    weight = torch.randn_like(x)
    compiled = torch.compile(plain) if shutil.which("g++") or shutil.which("clang++") else None
    tokens = batch * length
    flops = 2 * 2 * tokens * width**2 + 2 * 2 * tokens * length * width // 2
    common = {
        "op": "shaped_attention",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": threads,
        "without_us": "torch.compile, cumsum",
        "check": check(operands),
        "label": "projections included",
    }
    name = f"B{batch} T{length} D{width} H{count} causal"
    yield Case(
        shape=f"{name} forward",
        ours=forward(ours, operands),
        rivals={
            "standard block": forward(standard(count), [x, *weights]),
            "bare minimum": forward(bare(count), operands[:3]),
            "torch.compile, cumsum": compiled and forward(compiled, operands),
        },
        flops=flops,
        **common,
    )
    yield Case(
        shape=f"{name} forward+backward",
        ours=both_ways(ours, block, weight),
        rivals={
            "standard block": both_ways(standard(count), four, weight),
            "bare minimum": both_ways(bare(count), wanted[:3], weight),
            "torch.compile, cumsum": compiled and both_ways(compiled, block, weight),
        },
        flops=3 * flops,
        **common,
    )


@own_shape("shaped_attention", "BATCHxTOKENSxWIDTHxHEADS", "4x512x768x12", torch.float32, torch.bfloat16)
def own(batch: int, length: int, width: int, count: int, dtype: torch.dtype, threads: int):
    if width % count:
        raise ValueError(f"--shape: expected WIDTH a multiple of HEADS, got {width} and {count}")
    yield from sub_block(batch, length, width, count, dtype, "cpu", threads)


@benchmark("shaped_attention")
def cases(device: str, quick: bool):
    batch, length, width = (1, 256, 768) if quick else (4, 512, 768)
    for dtype in (torch.float32, torch.bfloat16):
        yield from sub_block(batch, length, width, HEADS, dtype, device)
