"""On a GPU: the operator itself, queries, keys and values in one call beside one dense product, both ways.

No module takes it there so far; whether one should is what these rows are for.
"""

import torch
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit.ops.gauge_linear.layout import dense
from gaugekit.reference.gauge_linear import gauge_linear as reference
from registry import Call, Planned, benchmark
from rivals import assert_close, both_ways, compiled, forward, trained

MODELS = {"DeiT-tiny": (192, 3, 197), "Whisper-tiny": (384, 6, 1500), "GPT-2": (768, 12, 1024)}


def rows_of(heads, inputs, width):
    """On the host, whose oracle reads them."""
    return torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()


def projections(model, batch, length, kind, way, device):
    inputs, heads, _ = MODELS[model]
    width = inputs // heads

    def operands(passed, batch=batch, length=length):
        """x, F, the rows ``passed`` on the device, the queries' weight and the weight of all three as one."""

        def random(*shape):
            return (torch.randn(*shape, device=device) / inputs**0.5).bfloat16()

        free, rows = random(2 * heads, inputs - width, width), passed.to(device)
        query = random(inputs, inputs)
        return random(batch, length, inputs), free, rows, query, torch.cat([query, dense(free, rows).mT])

    def ours(x, free, rows, query):
        return gk.gauge_linear(x, free, rows, None, query)

    def check():
        passed = rows_of(2 * heads, inputs, width)
        x, free, rows, query, weight = operands(passed, 1, 100)
        exact = reference(x.double(), free.double(), passed, None, query.double())
        assert_close(ours(x, free, rows, query), linear(x, weight), exact)

    def make():
        x, free, rows, query, weight = operands(rows_of(2 * heads, inputs, width))
        seed = [torch.randn(*x.shape[:-1], 3 * inputs, device=device).bfloat16()] if way is both_ways else []
        x, free, query, weight = trained(x, free, query, weight)
        limit = 1 / (1 - 2 / (3 * heads))
        products = 2 * x.numel() * inputs * 3 / limit
        return {
            "ours": Call(way(ours), (*seed, x, free, rows, query)),
            "rivals": {
                "torch linear, D to 3D": Call(way(linear), (*seed, x, weight)),
                "torch.compile": Call(way(compiled(linear)), (*seed, x, weight)),
            },
            "without_us": ("torch linear, D to 3D", "torch.compile"),
            "check": check,
            "flops": products * (1 if way is forward else 3),
            "extra": {"limit": limit},
        }

    shape = f"{model} QKV {batch}x{length} D{inputs} H{heads} {kind}"
    return Planned("gauge_linear", shape, "bfloat16", make, "", device)


@benchmark("gauge_linear", device="cuda")
def cases(device: str, quick: bool):
    for model, (_, _, length) in list(MODELS.items())[: 1 if quick else None]:
        for kind, way in (("forward", forward), ("forward+backward", both_ways)):
            batch, tokens = (1, 50) if quick else (16, length)
            yield projections(model, batch, tokens, kind, way, device)
