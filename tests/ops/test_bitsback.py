"""The stack and the rotations on it: C++ and the oracle leave the same words, and everything comes back."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import arm
from gaugekit import _library
from gaugekit.ops.bitsback import Stack, composition, operator, rotate
from gaugekit.ops.canonical_qr import canonical_qr
from gaugekit.ops.rans.operator import CorruptFile
from gaugekit.reference import bitsback as reference

ROOT = Path(__file__).resolve().parents[2]
PATHS = (-1, 0, 1, 2)
# what version 1 of the payload means: QR of 150 by 161; a rotation of 16 bits and one of 10, coded and recovered
DIGEST = "6a9dbdda98a48150 ffe24531c571f628 87dab73c15151c"
BINARY = pytest.mark.skipif(not _library.backends()["cpu"].loaded, reason="needs the C++ binary")


def integers(count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (count,), dtype=torch.int32, generator=generator)


def filled(seed: int = 0, words: int = 400) -> Stack:
    stack = Stack()
    stack.push_uniform(integers(words, 16, seed), 16)
    return stack


def copied(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    return stack.words.clone(), stack.counters.clone()


def held(words: torch.Tensor, counters: torch.Tensor) -> tuple[list[int], list[int]]:
    return words[: int(counters[0])].tolist(), counters.tolist()


def triangular(p: int, dimension: int, dtype=torch.float16, seed: int = 0, bits: int = 16):
    """(stored rows as float64, variance, integers, signs) of a random rotation of a random lower triangle."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(p, dimension, dtype=torch.float64, generator=generator)
    matrix = torch.zeros(dimension, dimension, dtype=torch.float64)
    matrix[:p] = rows
    q, _ = canonical_qr(matrix.T)
    c, signs = integers(operator.integers_of(p, dimension), bits, seed), integers(p, 1, seed + 1)
    stored = (rows @ rotate(q, c, signs, bits)).to(dtype).double()
    mantissa = {torch.float16: 10, torch.bfloat16: 7}[dtype]
    step = 2.0 ** (torch.frexp(stored)[1].double() - 1 - mantissa)
    return stored, (step * step / 12).mean(1), c, signs


# --- the stack ---


@pytest.mark.parametrize("bits", [1, 2, 7, 12, 13, 16])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_uniform_integers_are_the_oracles(bits, count):
    stack = filled()
    words, counters = copied(stack)
    words = torch.cat([words, words.new_zeros(count)])
    values = integers(count, bits, 3)
    stack.push_uniform(values, bits)
    composition.push_uniform(words, counters, values, bits)
    assert held(stack.words, stack.counters) == held(words, counters)
    out = torch.empty_like(values)
    composition.pop_uniform(words, counters, out, bits)
    assert torch.equal(out, values) and torch.equal(stack.pop_uniform(count, bits), values)
    assert held(stack.words, stack.counters) == held(words, counters) == held(*copied(filled()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 40, 257])
def test_weights_are_the_oracles(dtype, count):
    generator = torch.Generator().manual_seed(count)
    weights = (torch.randn(count, generator=generator) * (0.02 if dtype.is_floating_point else 20)).to(dtype)
    if dtype.is_floating_point and count > 3:
        weights[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    table = operator.frequencies_of(weights)
    assert int(table.sum()) == 4096 and (count == 0 or int(table.max()) <= 3840)
    data, kind = weights.view(torch.uint8), operator.KINDS[dtype]
    assert torch.equal(composition.histogram(data, kind), torch.ops.gaugekit.bitsback_histogram(data, kind))
    stack = filled()
    words, counters = copied(stack)
    words = torch.cat([words, words.new_zeros(2 * count)])
    stack.push_weights(weights, table)
    composition.push_weights(words, counters, data, table, kind)
    assert held(stack.words, stack.counters) == held(words, counters)
    out, again = torch.empty_like(weights), torch.empty_like(data)
    stack.pop_weights(out, table)
    composition.pop_weights(words, counters, again, table, kind)
    assert torch.equal(out.view(torch.uint8), data) and torch.equal(again, data)
    assert held(stack.words, stack.counters) == held(*copied(filled()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 90)), max_size=12), st.integers(0, 60))
def test_what_is_taken_and_given_back_leaves_no_trace(pops, words):
    """Of a stack with enough, and of one that needs the seed."""
    stack = filled(words=words)
    before = held(*copied(stack))
    taken = [(bits, stack.pop_uniform(count, bits)) for bits, count in pops]
    seeds = stack.seeds
    for bits, values in reversed(taken):
        stack.push_uniform(values, bits)
    expected = composition.seed_words(seeds).tolist() + before[0]
    assert stack.words[: stack.size].tolist() == expected
    assert stack.states.tolist() == before[1][3:]


def test_the_seed_is_found_again_or_is_not():
    stack = Stack()
    values = stack.pop_uniform(100, 13)
    assert stack.seeds > 0 and not stack.holds_the_seed(stack.seeds)
    stack.push_uniform(values, 13)
    assert stack.holds_the_seed(stack.seeds) and not stack.holds_the_seed(stack.seeds - 1)
    stack.words[0] ^= 1
    assert not stack.holds_the_seed(stack.seeds)


def test_a_read_stack_does_not_invent_words():
    stack = filled()
    reader = Stack(stack.words[: stack.size].clone(), stack.states)
    with pytest.raises(CorruptFile, match="ends too early"):
        reader.pop_uniform(1000, 16)
    words, counters = copied(reader)
    with pytest.raises(RuntimeError, match="ends too early"):
        composition.pop_uniform(words, counters, torch.empty(1000, dtype=torch.int32), 16)


def test_frequencies_that_do_not_sum_are_damage():
    for table in ([4095, 0], [4097], [-1, 4097], []):
        with pytest.raises(CorruptFile, match="4096"):
            filled().pop_weights(torch.empty(3, dtype=torch.int8), torch.tensor(table, dtype=torch.int32))


def test_bits_are_counted():
    """A symbol of 2^b slots takes b bits; a table's its information."""
    stack = filled(words=4000)
    before = stack.bits
    stack.push_uniform(integers(3000, 11, 5), 11)
    assert abs(stack.bits - before - 33_000) < 33
    weights = torch.randint(0, 2, (3000,), dtype=torch.uint8)
    before = stack.bits
    stack.push_weights(weights, torch.tensor([1024, 3072], dtype=torch.int32))
    ones = int(weights.sum())
    assert abs(stack.bits - before - 2 * (3000 - ones) - ones * np.log2(4 / 3)) < 5


# --- rotations ---


@pytest.mark.parametrize(
    ("p", "dimension", "bits"), [(1, 1, 16), (2, 2, 16), (3, 3, 10), (5, 9, 13), (9, 9, 2), (66, 66, 16)]
)
def test_rotations_are_the_oracles(p, dimension, bits):
    c, signs = integers(operator.integers_of(p, dimension), bits), integers(p, 1, 1)
    rows = torch.eye(dimension, dtype=torch.float64)[:5].contiguous()
    expected = composition.rotate(rows, c, signs, bits)
    for path in PATHS:
        assert torch.equal(rotate(rows, c, signs, bits, path), expected)


@pytest.mark.parametrize(
    ("p", "dimension", "dtype", "bits"),
    [
        (1, 1, torch.float16, 16),
        (2, 2, torch.float16, 16),
        (7, 7, torch.bfloat16, 13),
        (12, 20, torch.float16, 9),
        (20, 20, torch.bfloat16, 16),
        (66, 66, torch.float16, 16),
    ],
)
def test_corrections_are_the_oracles_and_bring_the_rotation_back(p, dimension, dtype, bits):
    rows, variance, c, signs = triangular(p, dimension, dtype, bits=bits)
    words, counters = copied(filled())
    words = torch.cat([words, words.new_zeros(3 * c.numel() + p)])
    composition.push_rotation(words, counters, rows, variance, c, signs, bits)
    for path in PATHS:
        stack = filled()
        stack.path = path
        stack.push_corrections(rows, variance, c, signs, bits)
        assert held(stack.words, stack.counters) == held(words, counters)
        assert all(map(torch.equal, stack.recover_rotation(rows, variance, bits), (c, signs)))
        assert held(stack.words, stack.counters) == held(*copied(filled()))
    assert all(map(torch.equal, composition.pop_rotation(words, counters, rows, variance, bits), (c, signs)))


@BINARY
@pytest.mark.parametrize(
    "kind", ["zero", "repeated", "nearly repeated", "falling", "not a number", "wrong variance"]
)
@pytest.mark.parametrize("dimension", [2, 3, 33, 130])
def test_whatever_the_rows_are_the_integers_come_back(kind, dimension):
    rows, variance, c, signs = triangular(dimension, dimension)
    if kind == "zero":
        rows[dimension // 2 :] = 0
    elif kind == "repeated":
        rows[dimension // 2 :] = rows[: dimension - dimension // 2].clone()
    elif kind == "nearly repeated":
        rows[1:] = rows[0] + 1e-6 * rows[1:]
    elif kind == "falling":
        rows *= 10.0 ** -torch.arange(dimension).double()[:, None]
    elif kind == "not a number":
        rows[1, 0], rows[0, 1] = torch.nan, torch.inf
    else:
        variance = (
            variance
            * torch.tensor([0.0, 1e30, torch.inf, torch.nan, -1.0]).double().repeat(dimension)[:dimension]
        )
    stack = filled()
    stack.push_corrections(rows, variance, c, signs, 16)
    for path in PATHS:
        reader = Stack(stack.words[: stack.size].clone(), stack.states, path)
        assert all(map(torch.equal, reader.recover_rotation(rows, variance, 16), (c, signs)))
        assert held(reader.words, reader.counters)[0] == held(*copied(filled()))[0]


@BINARY
def test_threads_change_no_bit():
    rows, variance, c, signs = triangular(200, 200)
    before, stacks = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        stacks.append(filled())
        stacks[-1].push_corrections(rows, variance, c, signs, 16)
    torch.set_num_threads(before)
    assert held(*copied(stacks[0])) == held(*copied(stacks[1])) == held(*copied(stacks[2]))


@BINARY
def test_corrections_take_little_more_than_the_rounding_allows():
    """A normal error of standard deviation s bins has log2(s √(2πe)) bits; the coder's are within 0.15 of them."""
    rows, variance, c, signs = triangular(256, 256)
    z = torch.from_numpy(reference.squared_quantiles(16)).double()
    density = torch.exp(-z / 2).log2().mean() - 1.3257480647361593  # of the bins' width, in the mean
    left = torch.arange(256, 0, -1).double()
    across = canonical_qr(rows.T.contiguous())[1].diagonal()
    error = (0.5 * (variance * left / across**2).log2() * (left - 1)).sum() / (left - 1).sum()
    ideal = float(error + density + 16 + 0.5 * np.log2(2 * np.pi * np.e))
    stack = filled()
    before = stack.bits
    stack.push_corrections(rows, variance, c, signs, 16)
    spent = (stack.bits - before) / c.numel()
    assert ideal < spent < ideal + 0.15


@BINARY
def test_random_integers_make_uniform_rotations():
    """Moments of Haar measure on O(n), n = 12: of 6,000 rotations, within four standard errors."""
    n, count = 12, 6000
    c = integers(count * operator.integers_of(n, n), 16, 7).view(count, -1)
    signs = integers(count * n, 1, 8).view(count, -1)
    identity = torch.eye(n, dtype=torch.float64)
    q = torch.stack([rotate(identity, c[i], signs[i], 16) for i in range(count)])
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    moments = {
        "element": (q[:, 3, 5], 0),
        "square": (q[:, 7, 2] ** 2, 1 / n),
        "corner": (q[:, -1, -1] ** 2, 1 / n),
        "fourth": (q[:, 4, 9] ** 4, 3 / (n * (n + 2))),
        "last fourth": (q[:, -1, -2] ** 4, 3 / (n * (n + 2))),
        "in a row": (q[:, 0, 0] ** 2 * q[:, 0, 1] ** 2, 1 / (n * (n + 2))),
        "apart": (q[:, 0, 0] ** 2 * q[:, 1, 1] ** 2, (n + 1) / ((n - 1) * n * (n + 2))),
        "crossed": (q[:, 0, 0] * q[:, 0, 1] * q[:, 1, 0] * q[:, 1, 1], -1 / ((n - 1) * n * (n + 2))),
        "trace": (trace, 0),
        "squared trace": (trace**2, 1),
        "determinant": (torch.linalg.det(q).sign(), 0),
    }
    for name, (samples, expected) in moments.items():
        error = samples.std() / count**0.5
        assert abs(samples.mean() - expected) < 4 * error, name


@pytest.mark.parametrize("bits", [2, 5, 10, 16])
def test_directions_give_their_integers_back(bits):
    for n in (2, 3, 10, 200):
        c = integers(n - 1, bits, n).numpy().astype(np.int64)
        for sign in (0, 1):
            v = reference.to_vector(c, sign, bits)
            assert abs(v @ v - 1) < n * np.finfo(np.float64).eps
            again, _, last = reference.to_integers(5.0 * v, 1.0, bits, 1e-30)
            assert (again == c).all() and last == sign
            assert (reference.to_integers(-v, -1.0, bits, 1e-30)[0] == c).all()


@BINARY
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_compiler_changes_no_bit(tmp_path):
    """The same headers without optimisation, with it, and with every freedom to fuse multiplications and additions."""
    source, digests = ROOT / "tests" / "ops" / "bitsback_digest.cpp", set()
    options = (["-O0"], ["-O2", "-ffp-contract=fast"])
    runs = []
    for i, flags in enumerate(options):
        command = ["g++", *flags, "-std=c++17", "-pthread", "-Wno-psabi", f"-I{ROOT / 'csrc'}", str(source)]
        runs.append(subprocess.Popen([*command, "-o", str(tmp_path / str(i))]))
    for i, run in enumerate(runs):
        assert run.wait(timeout=300) == 0
        done = subprocess.run(
            [str(tmp_path / str(i))], capture_output=True, text=True, check=True, timeout=120
        )
        lines = done.stdout.splitlines()
        assert len(lines) >= 2  # an instruction set, on one thread and on two
        digests |= set(lines)
    assert digests == {DIGEST}


@arm.EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-O0"], ["-O2", "-ffp-contract=fast"]])
def test_arm_changes_no_bit(tmp_path, flags):
    binary = arm.compiled(ROOT / "tests" / "ops" / "bitsback_digest.cpp", tmp_path / "digest", *flags)
    lines = arm.run(binary, "max")
    assert len(lines) == 6 and set(lines) == {DIGEST}  # three levels, on one thread and on two


def test_contract():
    rows, variance, c, signs = triangular(3, 4)
    ops, stack = torch.ops.gaugekit, filled(words=50)
    stack._room(200)
    data, table = (
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor([0, 1024, 1024, 2048], dtype=torch.int32),
    )
    for operator_, arguments in (
        (ops.bitsback_rotate, (rows, c, signs, 16)),
        (ops.bitsback_push_rotation, (stack.words, stack.counters, rows, variance, c, signs, 16)),
        (ops.bitsback_push_uniform, (stack.words, stack.counters, c, 16)),
        (ops.bitsback_pop_uniform, (stack.words, stack.counters, torch.zeros(4, dtype=torch.int32), 5)),
        (ops.bitsback_push_weights, (stack.words, stack.counters, data, table, 0)),
        (ops.bitsback_pop_weights, (stack.words, stack.counters, data.clone(), table, 0)),
        (ops.bitsback_histogram, (data, 0)),
    ):
        torch.library.opcheck(operator_.default, arguments)
    stack.push_corrections(rows, variance, c, signs, 16)
    torch.library.opcheck(
        ops.bitsback_pop_rotation.default, (stack.words, stack.counters, rows, variance, 16)
    )


@BINARY
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda s: torch.ops.gaugekit.bitsback_push_uniform(s.words[:2], s.counters, integers(9, 4), 4),
            "room",
        ),
        (
            lambda s: torch.ops.gaugekit.bitsback_pop_uniform(s.words, s.counters[:9], integers(9, 4), 4),
            "counters",
        ),
        (lambda s: torch.ops.gaugekit.bitsback_pop_uniform(s.words, s.counters, integers(9, 4), 17), "bits"),
        (lambda s: rotate(torch.eye(3).double(), integers(2, 4), integers(3, 1), 16), "integers"),
        (
            lambda s: rotate(
                torch.eye(2).double(), torch.tensor([-1], dtype=torch.int32), integers(2, 1), 16
            ),
            "integers",
        ),
        (lambda s: rotate(torch.eye(3), integers(3, 4), integers(3, 1), 16), "rows"),
        (
            lambda s: s.push_weights(
                torch.tensor([7], dtype=torch.uint8), torch.tensor([4096], dtype=torch.int32)
            ),
            "data",
        ),
    ],
)
def test_direct_calls_with_wrong_tensors_raise(call, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        call(filled())
