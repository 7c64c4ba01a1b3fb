"""QR with a positive diagonal in one fixed order of float64 roundings, written down in NumPy: the oracle of the tests.

Householder reflectors in panels of 64 (Schreiber and Van Loan's I − V T Vᵀ). What fixes every bit: a dot product has
eight partial sums, by the index modulo 8, added up as ((0+4)+(2+6))+((1+5)+(3+7)); in a matrix product each element is
one chain of fused multiply-adds over ascending indices. The matrix is held by rows: row j is column j of what is
factored, M = Q R, so that no step ever adds across the elements of a register.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

PANEL = 64
LANES = 8


def _two_sum(a, b):
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def _halves(a):
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def fma(a, b, c):
    """a·b + c rounded once, of float64 arrays: Boldo and Melquiond's emulation (IEEE Trans. Comput. 2008).

    The last sum is of the rounded head and of the tails rounded to odd, which makes rounding twice harmless.
    """
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c)))
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    lost = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    high, low = _two_sum(c, lost)
    head, rest = _two_sum(product, high)
    odd, error = _two_sum(low, rest)
    bits = np.ascontiguousarray(odd).view(np.int64)
    step = np.where((error > 0) == (odd > 0), 1, -1)
    odd = np.where((error != 0) & (bits % 2 == 0), bits + step, bits).view(np.float64)
    return head + odd.reshape(head.shape)


def fma_of(a: float, b: float, c: float) -> float:
    """The same of three numbers, in exact arithmetic."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def dots(u: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The dot product of u [n] with each row [..., n]."""
    n = u.size
    lanes = np.zeros((*rows.shape[:-1], LANES))
    for k in range(0, n, LANES):
        width = min(LANES, n - k)
        lanes[..., :width] = fma(u[k : k + width], rows[..., k : k + width], lanes[..., :width])
    a, b, c, d = (lanes[..., i] + lanes[..., i + 4] for i in range(4))
    return (a + c) + (b + d)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a·b, each element one chain over ascending indices."""
    for k in range(b.shape[0]):
        c = fma(a[:, k : k + 1], b[k], c)
    return c


@dataclass
class Reflectors:
    """Q = F_0 F_1 ..., F_j = s_j (I − tau_j u_j u_jᵀ); u_j is row j from column j on, signs[j] = s_0 ··· s_j."""

    matrix: np.ndarray  # [n, m]
    tau: list[float] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)

    def add(self, v: np.ndarray) -> None:
        """The reflector that sends e_1 to the unit vector ``v``; u = v ± e_1, the sign by which nothing cancels."""
        j = len(self.tau)
        self.matrix[j, j:] = v
        self.matrix[j, j] += 1.0 if v[0] > 0 else -1.0
        self.tau.append(1.0 / (1.0 + abs(v[0])))
        self.signs.append((self.signs[-1] if j else 1.0) * (-1.0 if v[0] > 0 else 1.0))


def block_reflector(of: Reflectors, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(Vᵀ [b, m − first], T [b, b]) of the panel from row ``first``: H_0 ··· H_{b−1} = I − V T Vᵀ."""
    b = min(PANEL, len(of.tau) - first)
    v = np.triu(of.matrix[first : first + b, first:])
    t = np.zeros((b, b))
    for i in range(b):
        dot = dots(v[i, i:], v[:i, i:])
        for r in range(i):
            total = 0.0
            for k in range(r, i):
                total = fma_of(t[r, k], dot[k], total)
            t[r, i] = -(of.tau[first + i] * total)
        t[i, i] = of.tau[first + i]
    return v, t


def update(v: np.ndarray, t: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """rows − ((rows V) T) Vᵀ."""
    b = v.shape[0]
    scaled = product(product(rows, v.T, np.zeros((rows.shape[0], b))), t, np.zeros((rows.shape[0], b)))
    return product(-scaled, v, rows)


def factor(matrix: np.ndarray, direction: Callable[[int, np.ndarray, float], np.ndarray]) -> Reflectors:
    """Eliminates the rows [n, m] of ``matrix`` one after another; ``direction(j, x, sign)`` gives the unit vector that
    the j-th reflector sends e_1 to, of x = row[j:], which is ``sign`` times the true column.
    """
    of = Reflectors(matrix.copy())
    n = matrix.shape[0]
    for first in range(0, n, PANEL):
        end = min(n, first + PANEL)
        for j in range(first, end):
            of.add(direction(j, of.matrix[j, j:], of.signs[-1] if j else 1.0))
            u, rows = of.matrix[j, j:], of.matrix[j + 1 : end, j:]
            scale = -(of.tau[j] * dots(u, rows))
            of.matrix[j + 1 : end, j:] = fma(scale[:, None], u, rows)
        if end < n:
            of.matrix[end:, first:] = update(*block_reflector(of, first), of.matrix[end:, first:])
    return of


def apply_transposed(of: Reflectors, rows: np.ndarray) -> np.ndarray:
    """rows Qᵀ."""
    n, m = len(of.tau), rows.shape[1]
    if n == 0:
        return rows.copy()
    rows = rows * np.array([of.signs[min(i, n - 1)] for i in range(m)])
    for first in reversed(range(0, n, PANEL)):
        v, t = block_reflector(of, first)
        rows[:, first:] = update(v, t.T, rows[:, first:])
    return rows


def canonical_qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q [m, n], R [n, n]) of a float64 matrix [m, n], m ≥ n, R's diagonal ≥ 0; of a zero column Q's is e_1's image."""
    m, n = matrix.shape
    norms = []

    def own(j, x, sign):
        norms.append(float(np.sqrt(dots(x, x))))
        return sign * x / norms[-1] if norms[-1] > 0 else np.eye(1, x.size)[0]

    of = factor(np.ascontiguousarray(matrix.T), own)
    r = np.array(
        [[of.signs[i] * of.matrix[j, i] + 0.0 if j > i else 0.0 for j in range(n)] for i in range(n)]
    )
    r = r.reshape(n, n) + np.diag(np.array(norms))
    return apply_transposed(of, np.eye(n, m)).T, r
