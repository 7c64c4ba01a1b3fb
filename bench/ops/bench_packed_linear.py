"""y = x Wᵀ with W packed, beside torch's linear with plain weights; and packing itself.

Every case runs through layers of one shape that together are larger than any cache, as a model does for each token, so
that the weights come from memory. Plain weights are ordinary allocations, and so are packed ones: no huge pages on
either side. Rows of fp32 are what a user without fast bfloat16 on the processor would run. float8_e5m2 weights stand
beside what there is without us: weights widened once, of twice the memory, or at each call.
"""

from functools import lru_cache

import torch
from torch.nn.functional import linear

from gaugekit.ops.packed_linear import PackedWeight, pack_weight, packed_linear
from registry import Case, benchmark, check_memory, own_shape, wanted

SHAPES = [(4096, 4096), (11008, 4096), (4096, 14336)]
BATCHES = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 128, 256)
FULL = (1, 2, 4, 16, 64)  # rows of x that float32 weights are multiplied with, too: they take long
FROM_MEMORY = ", weights from memory, ordinary pages on both sides"
TOTAL_BYTES = (
    384 << 20
)  # of plain bf16 weights a case; the largest cache of a core's neighbourhood is a tenth
FEWER_BYTES = 160 << 20  # for large batches, which take longer, and for a quick look
MOST_LAYERS = 512  # of a user's own shape, however small


@lru_cache(maxsize=1)
def layers(n: int, k: int, dtype: torch.dtype, device: str) -> tuple[list, list, list]:
    """Plain and packed weights of TOTAL_BYTES, and half as many in fp32."""
    generator = torch.Generator().manual_seed(0)
    count = max(2, min(MOST_LAYERS, TOTAL_BYTES // (n * k * 2)))
    first = (torch.randn(n, k, generator=generator) * 0.02).to(device, dtype)
    plain = [first] + [first.roll(i, 0).clone() for i in range(1, count)]
    return plain, [pack_weight(w) for w in plain], [w.float() for w in plain[: max(2, count // 2)]]


def check_product(x: torch.Tensor, packed: PackedWeight, plain: torch.Tensor) -> None:
    """At most twice torch's error, beside rounding to x's dtype."""
    ours, theirs = packed_linear(x, packed).double(), linear(x, plain).double()
    exact = x.double() @ plain.double().T
    noise = torch.finfo(x.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + noise


def product(n, k, batch, threads, dtype, device, total, label=FROM_MEMORY) -> Case:
    plain, packed, full = layers(n, k, dtype, device)
    count = max(2, total // (n * k * 2))
    plain, packed = plain[:count], packed[:count]
    x = torch.randn(batch, k, device=device).to(dtype)

    def fp32():
        for i in range(len(plain)):
            linear(x.float(), full[i % len(full)])

    memory = sum(w.bytes for w in packed)
    return Case(
        op="packed_linear", shape=f"batch {batch}, {n}x{k}", dtype=str(dtype)[6:], device=device,
        ours=lambda: [packed_linear(x, w) for w in packed],
        rivals={"torch linear": lambda: [linear(x, w) for w in plain]}
        | ({"torch linear, fp32 weights": fp32} if batch in FULL else {}),
        without_us="torch linear", check=lambda: check_product(x, packed[0], plain[0]), bytes_moved=memory,
        flops=2 * batch * n * k * len(plain), threads=threads, label=f"{threads} threads{label}",
        extra={"layers": len(plain), "packed_bytes": memory, "plain_bytes": sum(w.nbytes for w in plain)},
    )  # fmt: skip


@lru_cache(maxsize=1)
def e5m2_layers(n: int, k: int, dtype: torch.dtype, device: str, count: int) -> tuple[list, list, list]:
    """Weights widened to ``dtype``, float8_e5m2 ones and packed ones."""
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn(n, k, generator=generator) * 0.02).to(device, torch.float8_e5m2).view(torch.uint8)
    stored = [first.roll(i, 0).clone().view(torch.float8_e5m2) for i in range(count)]
    return [w.to(dtype) for w in stored], stored, [pack_weight(w) for w in stored]


def e5m2_product(n, k, batch, threads, dtype, device, total) -> Case:
    widened, stored, packed = e5m2_layers(n, k, dtype, device, max(2, total // (n * k * 2)))
    x = torch.randn(batch, k, device=device).to(dtype)
    memory = sum(w.bytes for w in packed)
    return Case(
        op="packed_linear", shape=f"batch {batch}, {n}x{k} of float8_e5m2", dtype=str(dtype)[6:], device=device,
        ours=lambda: [packed_linear(x, w) for w in packed],
        rivals={"torch linear, widened once": lambda: [linear(x, w) for w in widened],
                "torch linear, widened at each call": lambda: [linear(x, w.to(dtype)) for w in stored]},
        without_us="torch linear, widened once", check=lambda: check_product(x, packed[0], widened[0]),
        bytes_moved=memory, flops=2 * batch * n * k * len(packed), threads=threads,
        label=f"{threads} threads{FROM_MEMORY}",
        extra={"layers": len(packed), "packed_bytes": memory, "plain_bytes": sum(w.nbytes for w in stored)},
    )  # fmt: skip


def packing(device: str, rows: int, threads: int | None) -> Case:
    weight = (torch.randn(rows, 4096, device=device) * 0.02).bfloat16()
    copy = torch.empty_like(weight)

    def check():
        from gaugekit.ops.packed_linear import unpack_weight

        assert torch.equal(unpack_weight(pack_weight(weight)).view(torch.int16), weight.view(torch.int16))

    return Case(
        op="packed_linear", shape=f"pack {rows}x4096", dtype="bfloat16", device=device,
        ours=lambda: pack_weight(weight), rivals={"copy": lambda: copy.copy_(weight)}, without_us="copy", check=check,
        bytes_moved=weight.nbytes + pack_weight(weight).bytes, threads=threads,
        label=f"{threads} threads, fresh output", extra={"bytes_before": weight.nbytes},
    )  # fmt: skip


@own_shape("packed_linear", "ROWSxINPUTSxOUTPUTS", "1x4096x11008", torch.bfloat16, torch.float16)
def own(rows: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int):
    layer, total = 2 * inputs * outputs, TOTAL_BYTES if rows <= 4 else FEWER_BYTES
    # what the layers give stays until all have run
    count = max(2, min(MOST_LAYERS, total // (layer + 2 * rows * outputs)))
    check_memory(6 * layer + 6 * count * layer + 2 * rows * (4 * inputs + 8 * outputs + count * outputs))
    place = FROM_MEMORY if count * layer > FEWER_BYTES // 2 else ", whose weights a cache may hold"
    yield product(
        outputs, inputs, rows, threads, dtype, "cpu", count * layer, f", {count} layers a call{place}"
    )


@benchmark("packed_linear")
def cases(device: str, quick: bool):
    on = (1, 2)
    for n, k in SHAPES[:1] if quick else SHAPES:
        for threads in on:
            for batch in (1,) if quick else BATCHES:
                if wanted(f"batch {batch}, {n}x{k} bfloat16 {threads} threads{FROM_MEMORY}"):
                    total = TOTAL_BYTES if batch <= 4 and not quick else FEWER_BYTES
                    yield product(n, k, batch, threads, torch.bfloat16, device, total)
    for threads in on:
        if wanted(f"batch 1, 4096x4096 float16 {threads} threads{FROM_MEMORY}"):
            yield product(
                4096, 4096, 1, threads, torch.float16, device, FEWER_BYTES if quick else TOTAL_BYTES
            )
        for dtype in (torch.bfloat16, torch.float16):
            for batch in (1,) if quick else (1, 4, 16, 64, 256):
                name = (
                    f"batch {batch}, 4096x4096 of float8_e5m2 {str(dtype)[6:]} {threads} threads{FROM_MEMORY}"
                )
                if wanted(name):
                    total = TOTAL_BYTES if batch <= 4 and not quick else FEWER_BYTES
                    yield e5m2_product(4096, 4096, batch, threads, dtype, device, total)
        rows = 2048 if quick else 16384
        if wanted(f"pack {rows}x4096 bfloat16 {threads} threads, fresh output"):
            yield packing(device, rows, threads)
