"""Queries and keys of another width than the values: every pair a low rank may make."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate

KEYS, VALUES = (8, 16, 32, 48, 64, 96), (32, 64, 96, 128, 256)
PAIRS = list(itertools.product(KEYS, VALUES))
TELLING = [(8, 256), (48, 32), (96, 128)]  # the narrowest beside the widest, wider keys, no power of two


def make(pair, dtype, tokens=5, grad=False):
    key_width, width = pair
    shapes = [(1, 2, tokens, key_width), (1, 1, tokens, key_width), (1, 1, tokens, width)]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_matches_the_reference(pair, dtype):
    q, k, v = make(pair, dtype)
    gains = {name: torch.randn(2) for name in ("alpha", "beta", "gamma")}
    wide = {name: gain.double() for name, gain in gains.items()}
    exact = reference(q.double(), k.double(), v.double(), **wide, causal=True)
    narrow = {name: gain.to(dtype) for name, gain in gains.items()} if dtype == torch.float32 else gains
    naive = reference(q, k, v, **narrow, causal=True).to(dtype)
    assert_accurate(gk.shaped_attention(q, k, v, **gains, causal=True), exact, naive)


@pytest.mark.parametrize("pair", TELLING, ids=str)
def test_gradcheck(pair):
    operands = make(pair, torch.float64, tokens=2, grad=True)
    assert torch.autograd.gradcheck(lambda *x: gk.shaped_attention(*x, causal=True), operands, fast_mode=True)


@pytest.mark.parametrize("pair", TELLING, ids=str)
def test_opcheck(pair):
    operands = make(pair, torch.float32, grad=True)
    mask = (True, None, None, None, None, 0.25)
    torch.library.opcheck(torch.ops.gaugekit.shaped_attention.default, (*operands, *[None] * 5, *mask))


@pytest.mark.parametrize("pair", TELLING[:2], ids=str)
def test_compile(pair):
    counter = CompileCounterWithBackend("aot_eager")
    operands = make(pair, torch.float32)
    run = torch.compile(lambda *x: gk.shaped_attention(*x, causal=True), fullgraph=True, backend=counter)
    torch.testing.assert_close(run(*operands), gk.shaped_attention(*operands, causal=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("pair", TELLING, ids=str)
def test_decoding_with_narrow_keys(pair):
    """One query on a cache of keys K wide and values V wide is the last row of the whole."""
    q, k, v = make(pair, torch.float32, tokens=9)
    whole = gk.shaped_attention(q, k, v, causal=True)
    step = gk.shaped_attention(q[:, :, -1:], k, v, causal=True)
    exact = reference(q.double(), k.double(), v.double(), causal=True)
    assert_accurate(step, exact[:, :, -1:], whole[:, :, -1:])
