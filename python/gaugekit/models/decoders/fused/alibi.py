"""ALiBi: what a head adds to a score for each position further on."""

from __future__ import annotations


def slopes(heads: int) -> tuple[float, ...]:
    """[H] 2^(−8 i/n) for i = 1 ... n, n the largest power of two in H; then those of 2n that lie between, i odd.

    Source: Press, Smith and Lewis, "Train short, test long" (arXiv 2108.12409), and their code for other H.
    """
    power = 1 << (heads.bit_length() - 1)
    regular = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return (*regular, *between)
