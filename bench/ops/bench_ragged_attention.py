"""Scores of low rank: heads of different ranks beside padding them all, and the sub-block with narrow projections.

On a CPU torch's attention takes one width only; it is 9 to 28 times slower where keys and values differ, so the rival
pads queries and keys with zeros to the values' width, as a good user would. A sub-block of keys K wide beside one of
keys as wide as the values is another model; its row says so. That other model runs on whatever `plan` takes for it,
and, where that is ours, on torch's attention as well.
"""

import functools

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

import gaugekit as gk
from gaugekit.ops.shaped_attention import plan, use_core
from gaugekit.reference.ragged_attention import ragged_attention as reference
from registry import Case, benchmark, own_shape

HEADS, VALUES = 12, 64
ROUNDS = {"forward": 25, "forward+backward": 11}  # the latter take up to 0.7 s each


def heads(x, width):
    return x.unflatten(2, (-1, width)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def padded(q, k, v, scale):
    """q and k [B, H, T, K], zeros behind them or behind the values to one width."""
    width, values = max(q.shape[3], v.shape[3]), v.shape[3]
    q, k, v = (pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :values]


def checked(found, naive, exact):
    @functools.cache  # the cases that share it are checked once
    def call():
        wide = exact()
        error, allowed = ((f().double().cpu() - wide).abs().max() for f in (found, naive))
        assert error <= 2 * allowed + 1e-6, f"error {error:.2e}, plain torch's {allowed:.2e}"

    return call


def quiet(function):
    def call():
        with torch.no_grad():
            return function()

    return call


def block(x, query, key, gains, width):
    q, k, v = heads(linear(x, query), width), heads(linear(x, key), width), heads(x, VALUES)
    return joined(gk.shaped_attention(q, k, v, **gains, causal=True))


def both_ways(function, operands, weight):
    return lambda: torch.autograd.grad(function(*operands), operands, weight)


def ways(weight):
    """(name, run): run(function, operands) makes a call that takes the function forward, or both ways."""
    yield "forward", lambda f, o: quiet(lambda: f(*o))
    yield "forward+backward", lambda f, o: both_ways(f, [y.clone().requires_grad_() for y in o], weight)


def common_of(dtype, device, threads=None) -> dict:
    name = str(dtype).removeprefix("torch.")
    return {"op": "ragged_attention", "dtype": name, "device": device, "threads": threads}


def alone(batch, length, ranks, values, dtype, device, threads=None):
    """Heads of their ``ranks``, no projections, forward and both ways."""
    count = len(ranks)

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    v = random(batch, count, length, values)
    q, k = (random(batch, length, sum(ranks)) for _ in range(2))

    def ours(q, k, v):
        return gk.ragged_attention(q, k, v, ranks, scale=0.125, causal=True)

    def rival(q, k, v):
        wide = max(values, *ranks)
        parts = [[x[:, None] for x in y.split(ranks, -1)] for y in (q, k)]
        q, k = (torch.cat([pad(x, (0, wide - x.shape[3])) for x in y], 1) for y in parts)
        return padded(q, k, v, 0.125)

    def exact():
        return reference(*(x.double().cpu() for x in (q, k, v)), ranks, scale=0.125, causal=True)

    name = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}..{max(ranks)}"
    operands = (q, k, v)
    right = checked(*(quiet(lambda f=f: f(*operands)) for f in (ours, rival)), exact)
    for kind, run in ways(random(batch, count, length, values)):
        yield Case(
            shape=f"B{batch} T{length} H{count} K{name} V{values} causal {kind}",
            ours=run(ours, operands), rivals={"padded SDPA": run(rival, operands)},
            without_us="padded SDPA",
            check=right,
            flops=batch * length**2 * (sum(ranks) + count * values) * (1 if kind == "forward" else 3.5),
            label="no projections", rounds=ROUNDS[kind], **common_of(dtype, device, threads),
        )  # fmt: skip


@own_shape(
    "ragged_attention", "BATCHxTOKENSxHEADSxRANKxVALUES", "1x1024x12x16x64", torch.float32, torch.bfloat16
)
def own(batch: int, length: int, count: int, rank: int, values: int, dtype: torch.dtype, threads: int):
    yield from alone(batch, length, [rank] * count, values, dtype, "cpu", threads)


@benchmark("ragged_attention")
def cases(device: str, quick: bool):
    batch, length = (1, 128) if quick else (1, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        for ranks in ([16] * HEADS, [32] * HEADS, [8, 16, 16, 24, 24, 32, 32, 32, 40, 40, 48, 56]):
            yield from alone(batch, length, ranks, VALUES, dtype, device)
        yield from sub_blocks(batch, length, dtype, device)


def sub_blocks(batch, length, dtype, device):
    """A SAS sub-block with narrow keys beside one of keys as wide as its values."""
    tokens, width = batch * length, HEADS * VALUES

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, weight = random(batch, length, width), random(batch, length, width)
    gains = {name: torch.ones(HEADS, device=device) for name in ("alpha", "beta", "gamma")}
    full = [random(width, width) / width**0.5 for _ in range(2)]
    for rank in (16, 32):
        narrow = [random(HEADS * rank, width) / width**0.5 for _ in range(2)]

        def ours(*operands, rank=rank):
            return block(*operands, gains, rank)

        def wide(*operands):
            return block(*operands, gains, VALUES)

        def torchs(*operands):
            with use_core("torch"):
                return block(*operands, gains, VALUES)

        def finite(operands=(x, *narrow), ours=ours):
            assert ours(*operands).isfinite().all()

        for kind, run in ways(weight):
            rivals = {"K64": run(wide, [x, *full])}
            # else they are the same
            if plan(*(heads(x, VALUES),) * 3, causal=True).core.startswith("ragged"):
                rivals["K64, torch's attention"] = run(torchs, [x, *full])
            yield Case(
                shape=f"SAS sub-block B{batch} T{length} D{width} H{HEADS} K{rank} {kind}",
                ours=run(ours, [x, *narrow]), rivals=rivals,
                without_us="K64", rounds=ROUNDS[kind],
                check=finite, flops=4 * tokens * width * HEADS * rank * (3 if kind != "forward" else 1),
                label="another model: narrower keys, projections included", **common_of(dtype, device),
            )  # fmt: skip
