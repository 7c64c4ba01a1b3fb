"""canonical_qr beside LAPACK's QR, which is faster or slower by the machine and has other last bits on each."""

import torch

from gaugekit.ops.canonical_qr import canonical_qr
from registry import Case, benchmark, own_shape


def factored(size: int, device: str = "cpu", threads: int | None = None) -> Case:
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def check():
        q, r = canonical_qr(matrix)
        naive_q, naive_r = torch.linalg.qr(matrix)
        assert (q @ r - matrix).abs().max() <= 2 * (naive_q @ naive_r - matrix).abs().max()
        assert all(torch.equal(a, b) for a, b in zip((q, r), canonical_qr(matrix, 0), strict=True))

    return Case(
        op="canonical_qr",
        shape=f"{size}x{size}, Q and R",
        dtype="float64",
        device=device,
        ours=lambda: canonical_qr(matrix),
        rivals={"torch.linalg.qr": lambda: torch.linalg.qr(matrix)},
        without_us="torch.linalg.qr",
        check=check,
        flops=8 * size**3 // 3,
        threads=threads,
        rounds=9,
        seconds=1.0,
    )


@own_shape("canonical_qr", "SIZE", "512", torch.float64)
def own(size: int, dtype: torch.dtype, threads: int):
    yield factored(size, threads=threads)


@benchmark("canonical_qr")
def cases(device: str, quick: bool):
    for size in (128,) if quick else (256, 1024):
        yield factored(size, device)
