"""One QR factorisation with a positive diagonal: the same bits from every path, any number of threads, the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit import _library
from gaugekit.ops.canonical_qr import canonical_qr
from gaugekit.reference import canonical_qr as reference
from helpers import assert_accurate

PATHS = (-1, 0, 1, 2)  # a wider one than the processor has is the widest
BINARY = pytest.mark.skipif(not _library.backends()["cpu"].loaded, reason="needs the C++ binary")


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return all(torch.equal(x.view(torch.int64), y.view(torch.int64)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=3, max_size=3), st.integers(-60, 4))
def test_the_emulated_multiply_add_rounds_once(numbers, shift):
    """Beside exact fractions; the third operand near the product's negative too, where two roundings would show."""
    a, b, c = (x if abs(x) > 1e-100 else 0.0 for x in numbers)
    for third in (c, -a * b, -a * b * (1 + 2.0**shift)):
        assert reference.fma(a, b, third).item() == reference.fma_of(a, b, third)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 3), (8, 8), (17, 9), (40, 33), (70, 66)])
def test_paths_are_the_oracle_to_the_bit(shape):
    x = matrix(*shape)
    q, r = (torch.from_numpy(np.ascontiguousarray(y)) for y in reference.canonical_qr(x.numpy()))
    for path in PATHS:
        assert same((y.contiguous() for y in canonical_qr(x, path)), (q, r))


@BINARY
@pytest.mark.parametrize("size", [65, 128, 300])
def test_threads_and_strides_change_no_bit(threads, size):
    x = matrix(size + 7, size)
    threads(1)
    expected = canonical_qr(x)
    for count in (2, 3):
        threads(count)
        for path in PATHS:
            assert same(canonical_qr(x.T.contiguous().T, path), expected)


@pytest.mark.parametrize("shape", [(5, 5), (64, 64), (90, 40), (200, 200)])
def test_is_the_factorisation(shape):
    m, n = shape
    x = matrix(m, n)
    q, r = canonical_qr(x)
    naive_q, naive_r = torch.linalg.qr(x)
    assert_accurate(q @ r, x, naive_q @ naive_r)
    assert_accurate(q.T @ q, torch.eye(n, dtype=torch.float64), naive_q.T @ naive_q)
    assert torch.equal(r, r.triu()) and (r.diagonal() > 0).all()
    sign = naive_r.diagonal().sign()
    assert_accurate(q, naive_q * sign, q, ulps=2**14)  # of a well-conditioned matrix: the only one there is


@pytest.mark.parametrize("kind", ["zero", "repeated", "zero column", "tiny", "huge"])
def test_dependent_columns(kind):
    x = matrix(20, 20)
    if kind == "zero":
        x.zero_()
    elif kind == "repeated":
        x[:, 10:] = x[:, :10]
    elif kind == "zero column":
        x[:, 7] = 0
    else:
        x *= {"tiny": 1e-100, "huge": 1e100}[kind]
    q, r = canonical_qr(x)
    for path in PATHS:
        assert same(canonical_qr(x, path), (q, r))
    naive_q, naive_r = torch.linalg.qr(x)
    assert_accurate(q @ r, x, naive_q @ naive_r, ulps=64)
    assert_accurate(q.T @ q, torch.eye(20, dtype=torch.float64), naive_q.T @ naive_q, ulps=64)
    assert (r.diagonal() >= 0).all()


def test_nothing_and_contract():
    q, r = canonical_qr(torch.zeros(4, 0, dtype=torch.float64))
    assert q.shape == (4, 0) and r.shape == (0, 0)
    torch.library.opcheck(torch.ops.gaugekit.canonical_qr.default, (matrix(6, 4),))


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(3, 3), "expected float64 on the CPU"),
        (torch.zeros(2, 3, dtype=torch.float64), r"expected \[m, n\] with m >= n, got \[2, 3\]"),
        (torch.zeros(3, dtype=torch.float64), "expected"),
        (torch.full((2, 2), torch.nan, dtype=torch.float64), "expected finite numbers"),
    ],
)
def test_bad_input(x, sentence):
    with pytest.raises(ValueError, match=sentence):
        canonical_qr(x)
