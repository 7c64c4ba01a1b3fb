"""On a GPU: heads of different ranks beside padding them all, compiled, and the sub-block with narrow projections."""

import torch
from torch.nn.functional import linear, pad

import gaugekit as gk
from gaugekit.reference.ragged_attention import ragged_attention as reference
from registry import Call, Planned, benchmark
from rivals import both_ways, check_both_ways, compiled, forward, heads, joined, pinned, trained

HEADS, VALUES, SCALE = 12, 64, 0.125
MIXED = [8, 16, 16, 24, 24, 32, 32, 32, 40, 40, 48, 56]
CORES = ("cuDNN", "flash", "efficient")


def random(device, *shape):
    return torch.randn(*shape, device=device).bfloat16()


def ragged(ranks):
    return lambda q, k, v: gk.ragged_attention(q, k, v, ranks, scale=SCALE, causal=True)


def padded(ranks, core):
    """q and k [B, T, ΣR] as [B, H, T, V], zeros behind each head's columns, for torch's attention."""

    def call(q, k, v):
        parts = [[pad(x, (0, VALUES - x.shape[2])) for x in y.split(ranks, -1)] for y in (q, k)]
        return core(*(torch.stack(x, 1) for x in parts), v, SCALE)

    return call


def alone(ranks, batch, length, kind, way, device):
    def operands(batch=batch, length=length):
        q, k = (random(device, batch, length, sum(ranks)) for _ in range(2))
        return q, k, *(random(device, batch, HEADS, length, VALUES) for _ in range(2))

    def check():
        *few, weight = operands(1, 300)

        def exact(q, k, v):
            return reference(q, k, v, ranks, scale=SCALE, causal=True)

        check_both_ways(ragged(ranks), padded(ranks, pinned("flash")), exact, few, weight)

    def make():
        *leaves, weight = operands()
        given = (*([weight] if way is both_ways else []), *trained(*leaves))
        rivals = {
            f"torch.compile, padded, {name}": Call(way(compiled(padded(ranks, pinned(name)))), given)
            for name in CORES
        }
        return {
            "ours": Call(way(ragged(ranks)), given),
            "rivals": rivals,
            "without_us": tuple(rivals),
            "check": check,
            "flops": batch * length**2 * (sum(ranks) + HEADS * VALUES) * (1 if way is forward else 3.5),
        }

    name = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}..{max(ranks)}"
    shape = f"B{batch} T{length} H{HEADS} K{name} V{VALUES} causal {kind}"
    return Planned("ragged_attention", shape, "bfloat16", make, "no projections", device)


def sub_block(x, query, key, alpha, beta, gamma):
    q, k, v = heads(linear(x, query), HEADS), heads(linear(x, key), HEADS), heads(x, HEADS)
    return joined(gk.shaped_attention(q, k, v, alpha=alpha, beta=beta, gamma=gamma, causal=True))


def narrow(rank, batch, length, kind, way, device):
    width = HEADS * VALUES

    def make():
        x = random(device, batch, length, width)
        gains = [torch.ones(HEADS, device=device) for _ in range(3)]
        first = [random(device, batch, length, width)] if way is both_ways else []

        def call(rank):
            weights = [random(device, HEADS * rank, width) / width**0.5 for _ in range(2)]
            return Call(way(sub_block), (*first, *trained(x, *weights, *gains)))

        mine = call(rank)

        def finite():
            results = mine()
            results = results if isinstance(results, tuple) else [results]
            assert all(y.isfinite().all() for y in results)

        products = 4 * batch * length * width * HEADS * rank
        return {
            "ours": mine,
            "rivals": {"K64": call(VALUES)},
            "without_us": "K64",
            "check": finite,
            "flops": products * (1 if way is forward else 3),
        }

    shape = f"SAS sub-block B{batch} T{length} D{width} H{HEADS} K{rank} {kind}"
    label = "another model: narrower keys, projections included"
    return Planned("ragged_attention", shape, "bfloat16", make, label, device)


@benchmark("ragged_attention", device="cuda")
def cases(device: str, quick: bool):
    batch, length = (1, 256) if quick else (8, 2048)
    ways = (("forward", forward), ("forward+backward", both_ways))
    for ranks in (MIXED, [16] * HEADS):
        for kind, way in ways:
            yield alone(ranks, batch, length, kind, way, device)
    for kind, way in ways:
        yield narrow(16, batch, length, kind, way, device)
