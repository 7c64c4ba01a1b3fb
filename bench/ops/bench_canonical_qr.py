"""canonical_qr beside LAPACK's QR, which is faster or slower by the machine and has other last bits on each."""

import torch

from gaugekit.ops.canonical_qr import canonical_qr
from registry import Case, benchmark


@benchmark("canonical_qr")
def cases(device: str, quick: bool):
    generator = torch.Generator().manual_seed(0)
    for size in (128,) if quick else (256, 1024):
        matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)

        def check(matrix=matrix):
            q, r = canonical_qr(matrix)
            naive_q, naive_r = torch.linalg.qr(matrix)
            assert (q @ r - matrix).abs().max() <= 2 * (naive_q @ naive_r - matrix).abs().max()
            assert all(torch.equal(a, b) for a, b in zip((q, r), canonical_qr(matrix, 0), strict=True))

        yield Case(
            op="canonical_qr",
            shape=f"{size}x{size}, Q and R",
            dtype="float64",
            device=device,
            ours=lambda matrix=matrix: canonical_qr(matrix),
            rivals={"torch.linalg.qr": lambda matrix=matrix: torch.linalg.qr(matrix)},
            without_us="torch.linalg.qr",
            check=check,
            flops=8 * size**3 // 3,
            rounds=9,
            seconds=1.0,
        )
