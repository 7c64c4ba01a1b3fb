"""On a GPU: y = x Wᵀ with W packed, beside cuBLAS on plain weights.

A case runs through layers of one shape that together are larger than any cache, as a model does for each token: the
weights come from memory. Each version of the kernel for few rows is a case of its own.
"""

import torch
from torch.nn.functional import linear

from gaugekit.ops.packed_linear import pack_weight, packed_linear
from gaugekit.ops.packed_linear.cuda import BINARY_ROWS, VARIANTS
from registry import Call, Planned, benchmark
from rivals import assert_close

SHAPES = [(4096, 4096), (11008, 4096), (4096, 14336)]
TOTAL_BYTES = 384 << 20  # of plain weights a case


def few_rows(variant: int):
    """The binary's product, in one of its ways; where there is no binary, the composition."""
    return lambda x, packed: torch.ops.gaugekit.packed_linear_rows(x, *packed[:5], None, variant)


def versions(batch: int) -> dict:
    """What a call takes, and up to 16 rows each way of the binary's, by name."""
    ways = {name: few_rows(variant) for name, variant in VARIANTS.items()} if batch <= BINARY_ROWS else {}
    return {"as chosen": packed_linear} | ways


def product(name, ours, n, k, batch, dtype, device, total=TOTAL_BYTES):
    def weights(rows, columns, count):
        first = (torch.randn(rows, columns, device=device) * 0.02).to(dtype)
        return [first] + [first.roll(i, 0).clone() for i in range(1, count)]

    def check():
        for rows, columns in ((40, 1000), (128, 1024)):
            w, x = weights(rows, columns, 1)[0], torch.randn(batch, columns, device=device).to(dtype)
            assert_close(ours(x, pack_weight(w)), linear(x, w), x.double() @ w.double().T)

    def make():
        plain = weights(n, k, max(2, total // (2 * n * k)))
        packed = [pack_weight(w) for w in plain]
        x = torch.randn(batch, k, device=device).to(dtype)
        return {
            "ours": Call(lambda x, layers: [ours(x, w) for w in layers], (x, packed)),
            "rivals": {"torch linear": Call(lambda x, layers: [linear(x, w) for w in layers], (x, plain))},
            "without_us": "torch linear",
            "check": check,
            "bytes_moved": sum(w.bytes for w in packed),
            "flops": 2 * batch * n * k * len(plain),
            "goal": ("torch linear", 1.2) if batch == 1 else None,
            "extra": {
                "layers": len(plain),
                "packed_bytes": sum(w.bytes for w in packed),
                "plain_bytes": sum(w.nbytes for w in plain),
                "limit": sum(w.nbytes for w in plain) / sum(w.bytes for w in packed),
            },
        }

    shape = f"batch {batch}, {n}x{k}"
    return Planned("packed_linear", shape, str(dtype)[6:], make, f"{name}, weights from memory", device)


@benchmark("packed_linear", device="cuda")
def cases(device: str, quick: bool):
    shapes, total = ([(512, 1024)], 4 << 20) if quick else (SHAPES, TOTAL_BYTES)
    for batch in (1, 16, 64, 256):
        for n, k in shapes if batch == 1 else shapes[:1]:
            for name, ours in versions(batch).items():
                yield product(name, ours, n, k, batch, torch.bfloat16, device, total)
    for name, ours in versions(1).items():
        yield product(name, ours, *shapes[0], 1, torch.float16, device, total)
