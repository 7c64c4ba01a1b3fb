"""A value-free attention sub-block beside the standard one: what it computes at the start, its parameters, its time.

    python examples/value_free_attention.py [--quick]

The standard sub-block has four projections (query, key, value, output). The value-free one has two: each head's values
are a slice of the normalised input, and shaped attention (He and Hofmann, Simplifying Transformer Blocks, eq. 5) makes
it the identity when training starts, so that no skip connection is needed around it.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import gaugekit as gk


class Standard(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x):
        q, k, v = (split(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(a.transpose(1, 2).flatten(2))


class ValueFree(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.query.weight)
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(heads)) for _ in range(3))

    def forward(self, x):
        q, k = (split(layer(x), self.heads) for layer in (self.query, self.key))
        gains = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        out = gk.shaped_attention(q, k, split(x, self.heads), **gains, causal=True)
        return out.transpose(1, 2).flatten(2)


def split(x, heads):
    """[B, T, H·V] as a view [B, H, T, V]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def seconds(calls, repeats):
    """Median seconds of each call, taken in turns so that all see the same machine."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, kept in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            kept.append(time.perf_counter() - begin)
    return [statistics.median(kept[1:]) for kept in times]


def step(block, x):
    """Forward and backward."""
    block.zero_grad()
    block(x).square().mean().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape and few repetitions")
    quick = parser.parse_args().quick
    batch, length, width, heads, repeats = (1, 128, 384, 6, 4) if quick else (4, 512, 768, 12, 16)

    torch.manual_seed(0)
    x = torch.randn(batch, length, width)
    standard, free = Standard(width, heads), ValueFree(width, heads)

    with torch.no_grad():
        print(
            f"at the start, largest |block(x) − x|: {(free(x) - x).abs().max().item():.1e} of {x.abs().max():.1f}"
        )
        exact = (free.double()(x.double()) - x.double()).abs().max().item()
        free.float()
    print(f"the same in float64: {exact:.1e}")

    sizes = [sum(p.numel() for p in block.parameters()) for block in (standard, free)]
    print(f"parameters: standard {sizes[0]:,}, value-free {sizes[1]:,}")

    plan = gk.ops.shaped_attention.plan(*(split(x, heads) for _ in range(3)), alpha=free.alpha, causal=True)
    print(f"uses: {plan.core}, mask {plan.mask}, shaped_combine {plan.combine}")

    nn.init.normal_(free.query.weight, std=width**-0.5)  # as after training has moved it
    with torch.no_grad():
        old, new = seconds([lambda: standard(x), lambda: free(x)], repeats)
    print(
        f"forward, B{batch} T{length} D{width}: {1e3 * old:.1f} ms, value-free {1e3 * new:.1f} ms ({old / new:.2f}×)"
    )
    old, new = seconds([lambda: step(standard, x), lambda: step(free, x)], repeats)
    print(f"forward and backward: {1e3 * old:.1f} ms, value-free {1e3 * new:.1f} ms ({old / new:.2f}×)")


if __name__ == "__main__":
    main()
