"""``gaugekit::bitsback_*``: a stack of 32 interleaved rANS coders, and rotations taken from it and given back.

No autograd; the same bits from every backend and any number of threads. The stack lies in two tensors that the
operators write into: ``words`` int16 [capacity] and ``counters`` int64 [3 + 32], which are the words there, the words
taken of the seed, whether it may give any, and the coders' states. Without the binary NumPy answers, hundreds of times
slower (reference/bitsback.py).
"""

from __future__ import annotations

import numpy as np
import torch

from gaugekit import _library
from gaugekit.ops.bitsback import composition
from gaugekit.ops.rans.operator import CorruptFile
from gaugekit.reference.bitsback import CODERS, SLOTS, first_state

STACK = "Tensor(a!) words, Tensor(b!) counters"
CORRUPT = "corrupt stack: "
HEAD = 3
# how a dtype is coded -> the number of that; the symbols it then has
KINDS = {torch.uint8: 0, torch.int8: 0, torch.float16: 1, torch.bfloat16: 2}
ALPHABETS = {0: 256, 1: 32, 2: 256}


def _nothing(*arguments):
    return None


def _fake_pop_rotation(words, counters, rows, variance, bits, path=-1):
    p, m = rows.shape
    count = p * (m - 1) - p * (p - 1) // 2
    return rows.new_empty((count,), dtype=torch.int32), rows.new_empty((p,), dtype=torch.int32)


for _name, _schema, _fake in (
    ("push_uniform", f"{STACK}, Tensor values, int bits) -> ()", _nothing),
    ("pop_uniform", f"{STACK}, Tensor(c!) out, int bits) -> ()", _nothing),
    (
        "histogram",
        "Tensor data, int kind) -> Tensor",
        lambda data, kind: data.new_empty((ALPHABETS[kind],), dtype=torch.int64),
    ),
    ("push_weights", f"{STACK}, Tensor data, Tensor frequencies, int kind) -> ()", _nothing),
    ("pop_weights", f"{STACK}, Tensor(c!) out, Tensor frequencies, int kind) -> ()", _nothing),
    (
        "rotate",
        "Tensor rows, Tensor integers, Tensor signs, int bits, int path=-1) -> Tensor",
        lambda rows, integers, signs, bits, path=-1: torch.empty_like(
            rows, memory_format=torch.contiguous_format
        ),
    ),
    (
        "push_rotation",
        f"{STACK}, Tensor rows, Tensor variance, Tensor integers, Tensor signs, int bits, int path=-1) -> ()",
        _nothing,
    ),
    (
        "pop_rotation",
        f"{STACK}, Tensor rows, Tensor variance, int bits, int path=-1) -> (Tensor, Tensor)",
        _fake_pop_rotation,
    ),
):
    _library.define(f"bitsback_{_name}({_schema}", getattr(composition, _name), _fake)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _checked(operator, *arguments):
    try:
        return operator(*arguments)
    except RuntimeError as error:
        _, prefix, sentence = str(error).partition(CORRUPT)
        if not prefix:
            raise
        raise CorruptFile("not a sound stack: " + sentence.splitlines()[0]) from None


def integers_of(rows: int, dimension: int) -> int:
    """How many integers, signs apart, a rotation of ``dimension`` by ``rows`` reflectors has."""
    return rows * (dimension - 1) - rows * (rows - 1) // 2


class Stack:
    """The coder's stack: what is pushed last is popped first.

    words: int16 [N] of a stack that is to be read, with its ``states`` int64 [32]; both become the stack's own. None
        for an empty one to write, below which lies the seed, a fixed pseudo-random sequence that pops may take from.
    """

    def __init__(self, words: torch.Tensor | None = None, states: torch.Tensor | None = None, path: int = -1):
        self.path = path
        if words is None:
            self.words = torch.zeros(1024, dtype=torch.int16)
            states = torch.tensor([first_state(i) for i in range(CODERS)], dtype=torch.int64)
            head = [0, 0, 1]
        else:
            self.words = words
            head = [words.numel(), 0, 0]
        self.counters = torch.cat([torch.tensor(head, dtype=torch.int64), states])

    @property
    def size(self) -> int:
        """Words of 16 bits there."""
        return int(self.counters[0])

    @property
    def seeds(self) -> int:
        """Words taken of the seed."""
        return int(self.counters[1])

    @property
    def states(self) -> torch.Tensor:
        return self.counters[HEAD:]

    @property
    def bits(self) -> float:
        """What the stack holds, in bits, the words taken of the seed counted below zero."""
        return 16.0 * (self.size - self.seeds) + float(self.states.double().log2().sum())

    def holds_the_seed(self, seeds: int) -> bool:
        """Whether nothing lies here but the ``seeds`` words taken of the seed, as they were."""
        if self.size != seeds or not torch.equal(self.states, Stack().states):
            return False
        return torch.equal(self.words[:seeds], torch.from_numpy(composition.seed_words(seeds)))

    def _room(self, words: int) -> None:
        if self.size + words > self.words.numel():
            grown = torch.zeros(max(self.size + words, self.words.numel() * 3 // 2), dtype=torch.int16)
            grown[: self.size] = self.words[: self.size]
            self.words = grown

    def push_uniform(self, values: torch.Tensor, bits: int) -> None:
        """int32 ``values`` below 2^bits; 1 to 16 bits each."""
        self._room(values.numel())
        torch.ops.gaugekit.bitsback_push_uniform(
            self.words, self.counters, values.contiguous().view(-1), bits
        )

    def pop_uniform(self, count: int, bits: int) -> torch.Tensor:
        """int32 [count] below 2^bits; CorruptFile."""
        out = torch.empty(count, dtype=torch.int32)
        _checked(torch.ops.gaugekit.bitsback_pop_uniform, self.words, self.counters, out, bits)
        return out

    def push_weights(self, weights: torch.Tensor, frequencies: torch.Tensor) -> None:
        """A tensor of one of ``KINDS``' dtypes: exponents (of one byte each, all of it) by a table of int32
        ``frequencies`` that sum to 4096, the other bits as they are.
        """
        self._room(2 * weights.numel())
        data, kind = _as_bytes(weights), KINDS[weights.dtype]
        torch.ops.gaugekit.bitsback_push_weights(self.words, self.counters, data, frequencies, kind)

    def pop_weights(self, out: torch.Tensor, frequencies: torch.Tensor) -> None:
        """Into contiguous ``out`` of one of ``KINDS``' dtypes; CorruptFile."""
        data, kind = _as_bytes(out), KINDS[out.dtype]
        _checked(torch.ops.gaugekit.bitsback_pop_weights, self.words, self.counters, data, frequencies, kind)

    def pop_random_rotation(self, rows: int, dimension: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(integers, signs) of a rotation drawn from what the stack holds: uniform if that is."""
        integers = self.pop_uniform(integers_of(rows, dimension), bits)
        return integers, self.pop_uniform(rows, 1)

    def push_random_rotation(self, integers: torch.Tensor, signs: torch.Tensor, bits: int) -> None:
        """Gives back what ``pop_random_rotation`` took."""
        self.push_uniform(signs, 1)
        self.push_uniform(integers, bits)

    def push_corrections(
        self,
        rows: torch.Tensor,
        variance: torch.Tensor,
        integers: torch.Tensor,
        signs: torch.Tensor,
        bits: int,
    ) -> None:
        """Pushes what it takes to recover a rotation from stored rows.

        rows: float64 [p, D], R Qᵀ as it was stored, R lower triangular with a positive diagonal.
        variance: float64 [p], of the rounding of each row's elements; a wrong one costs bits, nothing else.
        integers, signs: int32, the rotation Q as ``pop_random_rotation`` gave it.
        bits: of an integer.
        """
        self._room(2 * integers.numel() + signs.numel())
        torch.ops.gaugekit.bitsback_push_rotation(
            self.words, self.counters, rows, variance, integers, signs, bits, self.path
        )

    def recover_rotation(
        self, rows: torch.Tensor, variance: torch.Tensor, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(integers, signs) of the rotation in the stored rows; pops what ``push_corrections`` pushed. CorruptFile."""
        return _checked(
            torch.ops.gaugekit.bitsback_pop_rotation,
            self.words,
            self.counters,
            rows,
            variance,
            bits,
            self.path,
        )


def rotate(
    rows: torch.Tensor, integers: torch.Tensor, signs: torch.Tensor, bits: int, path: int = -1
) -> torch.Tensor:
    """rows Qᵀ, float64 [n, D].

    rows: float64 [n, D].
    integers, signs: int32, the rotation Q as ``Stack.pop_random_rotation`` gives it.
    bits: of an integer.
    path: of the C++ code, 0 portable, 1 AVX2, 2 AVX-512, −1 the widest there is; changes the speed, never a bit.
    """
    return torch.ops.gaugekit.bitsback_rotate(rows, integers, signs, bits, path)


def frequencies_of(weights: torch.Tensor, most: int = SLOTS - 256) -> torch.Tensor:
    """int32 frequencies that sum to 4096, as ``weights`` has its symbols; none is above ``most``, so that a number of
    weights is never coded in next to no bits.
    """
    counts = torch.ops.gaugekit.bitsback_histogram(_as_bytes(weights), KINDS[weights.dtype]).numpy()
    if (counts > 0).sum() < 2:  # a second symbol takes what the first may not have
        counts[int(counts[0] > 0)] += 1
    used = counts > 0
    frequencies = np.where(used, np.clip(counts * (SLOTS / max(1, counts.sum())), 1, most), 0).astype(
        np.int64
    )
    while rest := SLOTS - int(frequencies.sum()):
        if rest > 0:  # to where one more gains most
            gain = np.where(used & (frequencies < most), counts / (frequencies + 0.5), -1.0)
        else:
            gain = np.where(frequencies > 1, -counts / (frequencies - 0.5), -np.inf)
        frequencies[int(gain.argmax())] += 1 if rest > 0 else -1
    return torch.from_numpy(frequencies.astype(np.int32))
