"""Calls that torch's attention answers as it is go to it by a short way: the same bits as by the long one."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import gaugekit as gk
from gaugekit.ops.shaped_attention import choice, operator, use_core

SHAPES = [  # heads, groups, queries, keys, width
    (4, 4, 1, 1, 32),
    (4, 2, 1, 70, 16),
    (4, 1, 5, 9, 8),
    (6, 3, 7, 7, 64),
    (2, 2, 40, 40, 33),
]


@pytest.fixture
def taken(monkeypatch):
    """What the short way was asked, and its answers."""
    answers = []

    def spy(*given):
        answers.append(as_it_is(*given))
        return answers[-1]

    as_it_is = operator.as_it_is
    monkeypatch.setattr(operator, "as_it_is", spy)
    return answers


def operands(heads, groups, queries, keys, width, dtype=torch.float32):
    torch.manual_seed(queries)
    return [
        torch.randn(2, n, rows, width).to(dtype)
        for n, rows in ((heads, queries), (groups, keys), (groups, keys))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(shape, causal, dtype, monkeypatch):
    q, k, v = operands(*shape, dtype)
    for scale in (None, 0.3):
        found = gk.shaped_attention(q, k, v, causal=causal, scale=scale)
        with monkeypatch.context() as long_way:
            long_way.setattr(operator, "as_it_is", lambda *_: None)
            assert torch.equal(gk.shaped_attention(q, k, v, causal=causal, scale=scale), found)


def test_it_is_taken_where_nothing_else_is_said(taken):
    q, k, v = operands(4, 2, 1, 9, 16)
    gk.shaped_attention(q, k, v, causal=True)
    assert taken == [{"is_causal": False}]  # one query sees all keys
    gk.shaped_attention(q, k, v)
    gk.shaped_attention(q[..., :8], k[..., :8], v)  # widths that torch's kernels do not take
    gk.shaped_attention(*operands(4, 2, 3, 9, 16), causal=True)  # a mask of its own
    gk.shaped_attention(*operands(4, 2, 9, 3, 16), causal=True)  # queries that see nothing
    with torch.autocast("cpu", torch.bfloat16):
        gk.shaped_attention(q, k, v)
    assert taken[1:] == [{"is_causal": False}, None, None, None, None]
    asked = len(taken)
    gk.shaped_attention(q, k, v, alpha=1.0, causal=True)
    gk.shaped_attention(q, k, v, key_lengths=[3, 9])
    gk.shaped_attention(q, k, v, window=4, causal=True)
    with use_core("ragged"):
        gk.shaped_attention(q, k, v)
    assert len(taken) == asked


def test_calls_that_our_own_kernel_takes_are_left_to_it(taken, monkeypatch):
    monkeypatch.setattr("gaugekit.ops.shaped_attention.core.cpu_core", lambda *_: choice.RAGGED)
    gk.shaped_attention(*operands(3, 3, 61, 61, 17))
    assert taken == [None]


def test_traced_with_sizes_left_open():
    given = operands(4, 2, 5, 5, 16)

    def attend(q, k, v):
        return gk.shaped_attention(q, k, v, causal=True)

    graphs = [make_fx(attend, tracing_mode="symbolic")(*given), torch.jit.trace(attend, given)]
    for graph in graphs:
        torch.testing.assert_close(graph(*given), attend(*given))


def test_what_does_not_fit_is_refused_as_ever():
    q, k, v = operands(4, 2, 5, 5, 16)
    for given, message in (
        ((q, k[:, :1], v), "k: expected"),
        ((q, k, v[0]), "v: expected"),
        ((q[:, :3], k, v), "v: expected .* dividing"),
        ((q, k.double(), v), "k: expected torch.float32"),
        ((q.int(), k.int(), v.int()), "dtype: expected"),
        ((q[:1], k, v), "v: expected"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                gk.shaped_attention(*given)
