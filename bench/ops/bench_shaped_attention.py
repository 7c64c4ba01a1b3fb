"""The attention sub-block of a simplified transformer (no value and no output projection) beside

the standard block (four projections), the bare minimum (two projections and torch's attention, nothing else: no
value-free block can be faster) and the same mathematics in plain torch under torch.compile, cumulative sum and all.
"""

import shutil

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

import gaugekit as gk
from gaugekit.reference.shaped_attention import shaped_attention as reference
from registry import Case, benchmark

HEADS = 12


def heads(x, count=HEADS):
    return x.unflatten(2, (count, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def ours(x, query, key, alpha, beta, gamma):
    q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
    return joined(gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True))


def plain(x, query, key, alpha, beta, gamma):
    q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
    a = scaled_dot_product_attention(q, k, v, is_causal=True)
    count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
    mean = v.float().cumsum(2) / count[:, None]
    alpha, beta, gamma = (gain[:, None, None] for gain in (alpha, beta, gamma))
    return joined((beta * a.float() + alpha * v.float() - gamma * mean).to(x.dtype))


def bare(x, query, key):
    return joined(
        scaled_dot_product_attention(heads(linear(x, query)), heads(linear(x, key)), heads(x), is_causal=True)
    )


def standard(x, query, key, value, output):
    q, k, v = (heads(linear(x, weight)) for weight in (query, key, value))
    return linear(joined(scaled_dot_product_attention(q, k, v, is_causal=True)), output)


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
        q, k, v = heads(linear(x, query)), heads(linear(x, key)), heads(x)
        exact = joined(
            reference(q, k, v, **dict(zip(("alpha", "beta", "gamma"), gains, strict=True)), causal=True)
        )
        found, naive = (forward(f, operands)().double().cpu() for f in (ours, plain))
        error, allowed = (found - exact).abs().max(), 2 * (naive - exact).abs().max()
        assert error <= allowed, f"error {error:.2e}, plain torch's {allowed / 2:.2e}"

    return call


@benchmark("shaped_attention")
def cases(device: str, quick: bool):
    batch, length, width = (1, 256, 768) if quick else (4, 512, 768)
    can_compile = shutil.which("g++") or shutil.which("clang++")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch, length, width, device=device).to(dtype)
        weights = [(torch.randn(width, width, device=device) / width**0.5).to(dtype) for _ in range(4)]
        gains = [torch.ones(HEADS, device=device) for _ in range(3)]
        operands = [x, *weights[:2], *gains]
        wanted = [y.clone().requires_grad_() for y in [x, *weights, *gains]]
        block, four = [*wanted[:3], *wanted[5:]], wanted[:5]
        weight = torch.randn_like(x)
        compiled = torch.compile(plain) if can_compile else None
        tokens = batch * length
        flops = 2 * 2 * tokens * width**2 + 2 * 2 * tokens * length * width // 2
        common = {
            "op": "shaped_attention",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "without_us": "torch.compile, cumsum",
            "check": check(operands),
            "label": "projections included",
        }
        name = f"B{batch} T{length} D{width} H{HEADS} causal"
        yield Case(
            shape=f"{name} forward",
            ours=forward(ours, operands),
            rivals={
                "standard block": forward(standard, [x, *weights]),
                "bare minimum": forward(bare, operands[:3]),
                "torch.compile, cumsum": compiled and forward(compiled, operands),
            },
            flops=flops,
            **common,
        )
        yield Case(
            shape=f"{name} forward+backward",
            ours=both_ways(ours, block, weight),
            rivals={
                "standard block": both_ways(standard, four, weight),
                "bare minimum": both_ways(bare, wanted[:3], weight),
                "torch.compile, cumsum": compiled and both_ways(compiled, block, weight),
            },
            flops=3 * flops,
            **common,
        )
