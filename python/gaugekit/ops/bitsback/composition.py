"""What answers where there is no binary: the stack of tensors handed to reference/bitsback.py, one symbol at a time."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch

from gaugekit.reference import bitsback as reference


def seed_words(count: int) -> np.ndarray:
    """int16 [count]: the words of the seed as they lie on a stack, the first one on top."""
    i = np.arange(count, dtype=np.uint64)[::-1] + np.uint64(1)
    x = i * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((x ^ x >> np.uint64(31)) >> np.uint64(48)).astype(np.uint16).view(np.int16)


@contextmanager
def _opened(words: torch.Tensor, counters: torch.Tensor):
    size, seeds, seeded, *states = counters.tolist()
    pile = words[:size].numpy().view(np.uint16).tolist()
    stack = reference.Stack(pile, states, seeds, bool(seeded))
    yield stack
    words[: len(stack.words)] = torch.from_numpy(np.array(stack.words, np.uint16).view(np.int16))
    counters[:2] = torch.tensor([len(stack.words), stack.seeds])
    counters[3:] = torch.tensor(stack.states)


def push_uniform(words, counters, values, bits):
    with _opened(words, counters) as stack:
        stack.push_uniform(values.tolist(), [bits] * values.numel())


def pop_uniform(words, counters, out, bits):
    with _opened(words, counters) as stack:
        out.copy_(torch.tensor(stack.pop_uniform([bits] * out.numel()), dtype=torch.int32))


def _symbols(data: torch.Tensor, kind: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(symbols, other bits, how many) of elements as bytes."""
    if kind == 0:
        return data.numpy(), np.zeros(data.numel(), np.int64), 0
    shift = {1: 10, 2: 7}[kind]
    bits = data.numpy().view(np.uint16).astype(np.int64)
    below = (1 << shift) - 1
    return bits >> shift & ((1 << (15 - shift)) - 1), bits & below | bits >> 15 << shift, shift + 1


def histogram(data, kind):
    alphabet = 32 if kind == 1 else 256
    return torch.from_numpy(np.bincount(_symbols(data, kind)[0], minlength=alphabet).astype(np.int64))


def push_weights(words, counters, data, frequencies, kind):
    symbols, others, bits = _symbols(data, kind)
    with _opened(words, counters) as stack:
        stack.push_uniform(others.tolist(), [bits] * len(symbols))
        stack.push_table(symbols.tolist(), frequencies.tolist())


def pop_weights(words, counters, out, frequencies, kind):
    table = frequencies.tolist()
    if min(table) < 0 or sum(table) != reference.SLOTS:
        raise RuntimeError("corrupt stack: frequencies do not sum to 4096")
    shift = {0: 0, 1: 10, 2: 7}[kind]
    with _opened(words, counters) as stack:
        count = out.numel() // (2 if kind else 1)
        symbols = np.array(stack.pop_table(count, table), np.int64)
        others = np.array(stack.pop_uniform([shift + 1 if kind else 0] * count), np.int64)
    bits = symbols << shift | others & ((1 << shift) - 1) | others >> shift << 15
    values = bits.astype(np.uint16 if kind else np.uint8).view(np.uint8)
    out.copy_(torch.from_numpy(values))


def _by_columns(integers: torch.Tensor, p: int, m: int) -> list[np.ndarray]:
    lengths = [m - 1 - j for j in range(p)]
    return np.split(integers.numpy().astype(np.int64), np.cumsum(lengths)[:-1]) if p else []


def rotate(rows, integers, signs, bits, path=-1):
    columns = _by_columns(integers, signs.numel(), rows.shape[1])
    return torch.from_numpy(
        np.ascontiguousarray(reference.rotate(rows.numpy(), columns, signs.tolist(), bits))
    )


def push_rotation(words, counters, rows, variance, integers, signs, bits, path=-1):
    with _opened(words, counters) as stack:
        columns = _by_columns(integers, *rows.shape)
        matrix = np.ascontiguousarray(rows.numpy())
        reference.correct(stack, matrix, variance.tolist(), columns, signs.tolist(), bits)


def pop_rotation(words, counters, rows, variance, bits, path=-1):
    with _opened(words, counters) as stack:
        matrix = np.ascontiguousarray(rows.numpy())
        columns, signs = reference.recover(stack, matrix, variance.tolist(), bits)
    integers = np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int32)
    return torch.from_numpy(integers), torch.tensor(signs, dtype=torch.int32)
