"""Bits-back over rotations, written down in Python and NumPy, one symbol at a time: the oracle of the tests.

He, Flamich, Hernández-Lobato (arXiv:2410.01309), with another code for the rotation: integers for the Householder
vectors of its QR factors, each a uniform direction by stick-breaking, and corrections that make the message exact. The
stack is 32 interleaved rANS coders (Duda, arXiv:1311.2540) over one pile of 16-bit words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gaugekit.reference.canonical_qr import Reflectors, apply_transposed, factor, fma, fma_of

CODERS, TABLE_BITS, SLOTS = 32, 12, 4096
GRID, CELLS = 1024, 4608  # of the normal distribution function: to z = 4.5
TABLES, MAX_BITS, CLASS_OFFSET = 25, 16, 4.0
CLASSES = TABLES + 4 * (MAX_BITS - 3)
TURNED = 64  # of 4096: the estimate of a column's last sign is wrong
MASK64 = (1 << 64) - 1


# --- the stack -----------------------------------------------------------------------------------------------


def seed_word(i: int) -> int:
    """Word number ``i`` of the seed, what lies below an empty stack: SplitMix64's highest 16 bits."""
    x = (i + 1) * 0x9E3779B97F4A7C15 & MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return (x ^ x >> 31) >> 48


def first_state(coder: int) -> int:
    return 1 << 16 | seed_word(-coder - 2 & MASK64)


@dataclass
class Stack:
    """What is pushed last is popped first. Symbol i of a sequence belongs to coder i mod 32; a sequence is pushed from
    its last symbol to its first, and popped from its first to its last.
    """

    words: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=lambda: [first_state(i) for i in range(CODERS)])
    seeds: int = 0  # words taken of the seed
    seeded: bool = True  # whether it may give words of the seed: encoding

    def refill(self, coder: int) -> None:
        if self.states[coder] >> 16:
            return
        if self.words:
            word = self.words.pop()
        elif self.seeded:
            word, self.seeds = seed_word(self.seeds), self.seeds + 1
        else:
            raise RuntimeError("corrupt stack: it ends too early")
        self.states[coder] = self.states[coder] << 16 | word

    def push(self, symbols: Sequence[tuple[int, int, int]]) -> None:
        """Symbols as (start, frequency, bits): slots start ... start + frequency − 1 of 2^bits."""
        for i in reversed(range(len(symbols))):
            start, frequency, bits = symbols[i]
            x = self.states[i % CODERS]
            if x >> (32 - bits) >= frequency:
                self.words.append(x & 0xFFFF)
                x >>= 16
            self.states[i % CODERS] = (x // frequency << bits) + start + x % frequency

    def pop(self, count: int, bits_of, lookup) -> list[int]:
        """``count`` symbols; symbol i takes bits_of(i) bits, and its slot is looked up: (symbol, start, frequency)."""
        symbols = []
        for i in range(count):
            bits, x = bits_of(i), self.states[i % CODERS]
            slot = x & ((1 << bits) - 1)
            symbol, start, frequency = lookup(i, slot)
            self.states[i % CODERS] = frequency * (x >> bits) + slot - start
            self.refill(i % CODERS)
            symbols.append(symbol)
        return symbols

    def push_uniform(self, values, bits: Sequence[int]) -> None:
        self.push([(int(v) & ((1 << b) - 1), 1, b) for v, b in zip(values, bits, strict=True)])

    def pop_uniform(self, bits: Sequence[int]) -> list[int]:
        return self.pop(len(bits), lambda i: bits[i], lambda i, slot: (slot, slot, 1))

    def push_table(self, symbols, frequencies: Sequence[int]) -> None:
        starts = np.cumsum([0, *frequencies]).tolist()
        self.push([(starts[s], frequencies[s], TABLE_BITS) for s in symbols])

    def pop_table(self, count: int, frequencies: Sequence[int]) -> list[int]:
        starts = np.cumsum([0, *frequencies]).tolist()
        owner = np.repeat(np.arange(len(frequencies)), frequencies).tolist()
        return self.pop(
            count,
            lambda i: TABLE_BITS,
            lambda i, slot: (owner[slot], starts[owner[slot]], frequencies[owner[slot]]),
        )


# --- integers and directions ---------------------------------------------------------------------------------


def exp_minus(y: np.ndarray) -> np.ndarray:
    """exp(−y) to a few units in the last place, by multiply-adds alone."""
    shifted = fma(-y, float.fromhex("0x1.71547652b82fep0"), 1.5 * 2.0**52)
    k = shifted - 1.5 * 2.0**52
    r = fma(-k, float.fromhex("0x1.62e42fefa3800p-1"), -y)
    r = fma(-k, float.fromhex("0x1.ef35793c76730p-45"), r)
    p = np.full_like(r, 1.0 / 479001600)
    for i in range(11, -1, -1):
        p = fma(p, r, 1.0 / math.factorial(i))
    return p * 2.0**k


def log_one_plus(w: np.ndarray) -> np.ndarray:
    """log(1 + w), w ≥ 0, the same way: 2 atanh(r / (2 + r))."""
    half_root = 0x3FE6A09E00000000
    shifted = (1.0 + w).view(np.int64) - half_root
    k = shifted >> 52
    f = ((shifted & 0x000FFFFFFFFFFFFF) + half_root).view(np.float64)
    r = np.where(k == 0, w, f - 1.0)
    s = r / (2.0 + r)
    t = s * s
    p = np.full_like(t, 2.0 / 17)
    for i in range(15, 0, -2):
        p = fma(p, t, 2.0 / i)
    return fma(k.astype(np.float64), float.fromhex("0x1.62e42fefa39efp-1"), s * p)


@functools.cache
def normal_grid() -> np.ndarray:
    """The normal distribution function less 1/2 at z = i / GRID, by Simpson's rule."""

    def shape(z):
        return exp_minus(z * z * 0.5)

    i, peak = np.arange(CELLS + 1), 0.3989422804014327
    ends = fma(peak, shape(i / GRID), peak * shape((i + 1) / GRID))
    cells = fma(4.0 * peak, shape((i + 0.5) / GRID), ends)
    grid = [0.0]
    for cell in cells.tolist():
        grid.append(fma_of(cell, 1.0 / (6 * GRID), grid[-1]))
    return np.array(grid)


@functools.cache
def squared_quantiles(bits: int) -> np.ndarray:
    """z² of the 2^(bits − 1) quantiles above the median, (h + 1/2) / 2^bits above it."""
    grid = normal_grid()
    target = (np.arange(1 << (bits - 1)) + 0.5) / (1 << bits)
    cell = np.minimum(np.searchsorted(grid[: CELLS + 1], target, side="right") - 1, CELLS - 1)
    z = (cell + (target - grid[cell]) / (grid[cell + 1] - grid[cell])) / GRID
    return z * z


def scales(n: int) -> np.ndarray:
    """s for n, n − 1, ..., 2 dimensions left: z² s = −log(1 − t²) by Wallace's approximation (Biometrika 1959)."""
    nu = np.arange(n - 1, 0, -1, dtype=np.float64)
    ratio = (8 * nu + 3) / (8 * nu + 1)
    return ratio * ratio / nu


def to_vector(integers: np.ndarray, sign: int, bits: int) -> np.ndarray:
    """The unit vector of n − 1 integers below 2^bits and a sign (0 or 1)."""
    half = 1 << (bits - 1)
    h = integers - half
    kept = exp_minus(squared_quantiles(bits)[np.where(h < 0, -1 - h, h)] * scales(integers.size + 1))
    left = np.multiply.accumulate(np.concatenate([[1.0], kept]))
    size = np.sqrt(left[:-1] * (1.0 - kept))
    last = (1.0 if sign else -1.0) * np.sqrt(left[-1])
    return np.append(np.where(h < 0, -size, size), last)


def to_integers(x: np.ndarray, sign: float, bits: int, variance: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(integers, classes of their errors, last sign) of the direction of ``sign``·x, whose components have this
    variance of rounding.
    """
    n, half = x.size, 1 << (bits - 1)
    left = [0.0] * (n + 1)
    for k in reversed(range(n)):
        left[k] = fma_of(x[k], x[k], left[k + 1])
    after = np.maximum(np.array(left[1:n]), 1e-290)
    with np.errstate(over="ignore"):
        ratio = np.minimum(x[:-1] * x[:-1] / after, 1e300)
    square = log_one_plus(ratio) * (1.0 / scales(n))
    place = np.minimum(np.sqrt(square) * GRID, CELLS - 0.001)
    cell, grid = place.astype(np.int64), normal_grid()
    u = fma(place - cell, grid[cell + 1] - grid[cell], grid[cell]) * float(1 << bits)
    h = np.minimum(u, half - 1).astype(np.int64)
    integers = np.where(sign * x[:-1] > 0, half + h, half - 1 - h)
    relative = min(max(variance * n / max(left[0], 1e-290), 2.0**-60), 2.0**20)
    log = fma_of(float(log_one_plus(np.array([relative * 2.0**60 - 1.0]))[0]), 1.4426950408889634, -60.0)
    level = 2 * log + 4 * (bits - 1.3257480647361593 + CLASS_OFFSET) + 0.5
    classes = np.clip(fma(-2.8853900817779268, square, level), 0, CLASSES - 1).astype(np.int64)
    return integers, classes, int(sign * x[-1] > 0)


def reflectors_of(integers: list[np.ndarray], signs: Sequence[int], m: int, bits: int) -> Reflectors:
    of = Reflectors(np.zeros((len(signs), m)))
    for column, sign in zip(integers, signs, strict=True):
        of.add(to_vector(column, sign, bits))
    return of


def rotate(rows: np.ndarray, integers: list[np.ndarray], signs: Sequence[int], bits: int) -> np.ndarray:
    """rows Qᵀ, Q the rotation of these integers, column by column."""
    return apply_transposed(reflectors_of(integers, signs, rows.shape[1], bits), rows)


# --- corrections ---------------------------------------------------------------------------------------------


def _normal_below(z: float) -> float:
    size = abs(z) * GRID
    if not size < CELLS:
        return 0.0 if z < 0 else 1.0
    cell, grid = int(size), normal_grid()
    above = fma_of(size - cell, float(grid[cell + 1] - grid[cell]), float(grid[cell]))
    return 0.5 - above if z < 0 else 0.5 + above


@functools.cache
def correction_table(index: int) -> tuple[int, list[int]]:
    """(reach, frequencies) for a standard error of 2^(index/4 − 4) bins: errors −reach ... reach, then the escape."""
    root = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)[index % 4]
    error = root * 2.0 ** (index // 4 - 4)
    reach = int(4.5 * error) + 1
    symbols = 2 * reach + 2
    frequencies = []
    for e in range(-reach, reach + 1):
        chance = 0.0
        for i in range(32):
            place = (i + 0.5) / 32
            chance += _normal_below((place - e) / error) - _normal_below((place - e - 1) / error)
        frequencies.append(int(chance / 32 * (SLOTS - symbols)) + 1)
    frequencies.append(1)
    frequencies[reach] += SLOTS - sum(frequencies)
    return reach, frequencies


def split_of(index: int, bits: int) -> tuple[int | None, int]:
    """(table, bits stored as they are) for errors of a class."""
    if index < TABLES:
        return (None, bits) if index // 4 - 4 > bits - 3 else (index, 0)
    low = (index - TABLES) // 4 + 1
    return (None, bits) if low > bits - 4 else (index - 4 * low, low)


def push_corrections(stack: Stack, errors: np.ndarray, classes: np.ndarray, bits: int) -> None:
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    low, values, symbols = [], [], []
    for error, (table, count) in zip(
        errors.tolist(), (split_of(c, bits) for c in classes.tolist()), strict=True
    ):
        rounded = ((error + half) & mask) - half + ((1 << count) >> 1)
        symbols.append((0, 1, 0))
        if table is None:
            low.append(bits), values.append(error)
            continue
        reach, frequencies = correction_table(table)
        symbol = (rounded >> count) + reach
        escape = not 0 <= symbol <= 2 * reach
        symbol = 2 * reach + 1 if escape else symbol
        low.append(bits if escape else count), values.append(error if escape else rounded)
        symbols[-1] = (sum(frequencies[:symbol]), frequencies[symbol], TABLE_BITS)
    stack.push_uniform(values, low)
    stack.push(symbols)


def pop_corrections(stack: Stack, classes: np.ndarray, bits: int) -> np.ndarray:
    splits = [split_of(c, bits) for c in classes.tolist()]

    def lookup(i, slot):
        if splits[i][0] is None:
            return None, 0, 1
        _, frequencies = correction_table(splits[i][0])
        symbol = start = 0
        while slot >= start + frequencies[symbol]:
            start, symbol = start + frequencies[symbol], symbol + 1
        return symbol, start, frequencies[symbol]

    symbols = stack.pop(len(splits), lambda i: 0 if splits[i][0] is None else TABLE_BITS, lookup)
    reach = [0 if table is None else correction_table(table)[0] for table, _ in splits]
    whole = [s is None or s > 2 * r for s, r in zip(symbols, reach, strict=True)]
    low = [bits if w else count for w, (_, count) in zip(whole, splits, strict=True)]
    errors = stack.pop_uniform(low)
    for i, count in enumerate(low):
        if not whole[i]:
            errors[i] += ((symbols[i] - reach[i]) << count) - ((1 << count) >> 1)
    return np.array(errors, np.int64)


# --- rotations on the stack ----------------------------------------------------------------------------------


TURN = [SLOTS - TURNED, TURNED]


def recover(stack: Stack, rows: np.ndarray, variance, bits: int) -> tuple[list[np.ndarray], list[int]]:
    """Integers and signs, by columns, of the Q in rows ≈ R Qᵀ, R lower triangular; pops the corrections."""
    integers: list[np.ndarray] = []
    signs: list[int] = []

    def direction(j, x, sign):
        estimate, classes, last = to_integers(x, sign, bits, float(variance[j]))
        estimate = (estimate - pop_corrections(stack, classes, bits)) & ((1 << bits) - 1)
        integers.append(estimate)
        signs.append(last ^ stack.pop_table(1, TURN)[0])
        return to_vector(estimate, signs[-1], bits)

    factor(rows, direction)
    return integers, signs


def correct(stack: Stack, rows: np.ndarray, variance, integers: list[np.ndarray], signs, bits: int) -> None:
    """Pushes the corrections that ``recover`` will need to come back to these integers."""
    pushes: list[Callable[[], None]] = []

    def direction(j, x, sign):
        estimate, classes, last = to_integers(x, sign, bits, float(variance[j]))
        pushes.append(lambda: push_corrections(stack, estimate - integers[j], classes, bits))
        pushes.append(lambda: stack.push_table([last ^ int(signs[j])], TURN))
        return to_vector(integers[j], signs[j], bits)

    factor(rows, direction)
    for push in reversed(pushes):
        push()
