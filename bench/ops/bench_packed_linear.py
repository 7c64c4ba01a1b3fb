"""y = x Wᵀ with W packed, beside torch's linear with plain weights; and packing itself.

Every case runs through layers of one shape that together are larger than any cache, as a model does for each token, so
that the weights come from memory. Plain weights are ordinary allocations, and so are packed ones: no huge pages on
either side. Rows of fp32 are what a user without fast bfloat16 on the processor would run.
"""

import torch
from torch.nn.functional import linear

from gaugekit.ops.packed_linear import packed_linear
from gaugekit.ops.packed_linear_weight import pack_weight
from registry import Case, benchmark

SHAPES = [(4096, 4096), (11008, 4096), (4096, 14336)]
TOTAL_BYTES = 640 << 20  # of plain bf16 weights a case
PEAK_CACHE_BYTES = 160 << 20  # enough for a quick look on most machines


def layers(n: int, k: int, dtype: torch.dtype, total: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = max(2, total // (n * k * 2))
    first = (torch.randn(n, k, generator=generator) * 0.02).to(dtype)
    return [first] + [first.roll(i, 0).clone() for i in range(1, count)]


def product(n, k, batch, threads, dtype, device, total) -> Case:
    plain = [w.to(device) for w in layers(n, k, dtype, total)]
    packed = [pack_weight(w) for w in plain]
    full = [w.float() for w in plain[: max(2, len(plain) // 2)]]
    x = torch.randn(batch, k, device=device).to(dtype)

    def check():
        ours, theirs = packed_linear(x, packed[0]).double(), linear(x, plain[0]).double()
        exact = x.double() @ plain[0].double().T
        noise = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + noise

    def fp32():
        for i in range(len(plain)):
            linear(x.float(), full[i % len(full)])

    memory = sum(w.bytes for w in packed)
    return Case(
        op="packed_linear", shape=f"batch {batch}, {len(plain)} x {n}x{k}", dtype=str(dtype)[6:], device=device,
        ours=lambda: [packed_linear(x, w) for w in packed],
        rivals={"torch linear": lambda: [linear(x, w) for w in plain], "torch linear, fp32 weights": fp32},
        without_us="torch linear", check=check, bytes_moved=memory, flops=2 * batch * n * k * len(plain),
        threads=threads, label=f"{threads} threads, weights from memory",
        extra={"packed_bytes": memory, "plain_bytes": sum(w.nbytes for w in plain)},
    )  # fmt: skip


def packing(device: str, rows: int) -> Case:
    weight = (torch.randn(rows, 4096, device=device) * 0.02).bfloat16()
    copy = torch.empty_like(weight)

    def check():
        from gaugekit.ops.packed_linear_weight import unpack_weight

        assert torch.equal(unpack_weight(pack_weight(weight)).view(torch.int16), weight.view(torch.int16))

    return Case(
        op="packed_linear", shape=f"pack {rows}x4096", dtype="bfloat16", device=device,
        ours=lambda: pack_weight(weight), rivals={"copy": lambda: copy.copy_(weight)}, without_us="copy", check=check,
        bytes_moved=weight.nbytes + pack_weight(weight).bytes, threads=1, label="1 thread, fresh output",
        extra={"bytes_before": weight.nbytes},
    )  # fmt: skip


@benchmark("packed_linear")
def cases(device: str, quick: bool):
    total = PEAK_CACHE_BYTES if quick else TOTAL_BYTES
    for threads in (1, 2) if device == "cpu" else (None,):
        for n, k in SHAPES[:1] if quick else SHAPES:
            for batch in (1,) if quick else (1, 4, 16, 32) if device == "cpu" else (1, 16, 256):
                yield product(n, k, batch, threads, torch.bfloat16, device, total)
    yield product(4096, 4096, 1, 1, torch.float16, device, total)
    yield packing(device, 2048 if quick else 16384)
