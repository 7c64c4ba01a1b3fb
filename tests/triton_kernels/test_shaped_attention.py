"""The fused shaped attention against the float64 oracle: every option, forward and backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.triton_kernels import shaped_attention as kernels
from helpers import assert_accurate
from triton_attention import backward, bounds, build, check, forward, lengths
from triton_cases import DEVICE, in_dtypes, masks

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


CASES = {
    "causal, K < V": {"key_width": 8, "queries": 150, "keys": 150, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "causal, K > V": {"key_width": 40, "width": 8, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "every key, T > S": {"gains": "bg", "queries": 70, "keys": 17, "heads": 1, "groups": 1},
    "chunk of queries": {"gains": "abg", "queries": 20, "keys": 90, "mask": {"causal": True}},
    "causal window": {"queries": 70, "keys": 70, "heads": 1, "groups": 1, "mask": {"causal": True, "window": 30}},
    "window on both sides": {"heads": 1, "groups": 1, "mask": {"window": 9}},
    "query_start, ragged, GQA": {"batch": 2, "heads": 4, "queries": 20, "keys": 50, "mask": {
        "causal": True, "query_start": lengths(-3, 40), "key_lengths": lengths(50, 47)}},
    "lengths, one of them 0": {"batch": 2, "heads": 1, "groups": 1, "mask": {"key_lengths": lengths(0, 33)}},
    "packed, window, GQA": {"groups": 1, "queries": 60, "keys": 60, "mask": {
        "causal": True, "window": 9, "cu_seqlens": bounds(0, 0, 13, 60)}},
    "widths 72 and 136": {"key_width": 72, "width": 136, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "widths 48 and 32": {"key_width": 48, "width": 32, "heads": 1, "groups": 1, "gains": "b", "queries": 9, "keys": 9},
    "widths 8, 256": {"key_width": 8, "width": 256, "heads": 1, "groups": 1, "gains": "b", "queries": 20, "keys": 20},
    "beta alone": {"gains": "b", "queries": 20, "keys": 10, "mask": {"causal": True}},
    "no gain": {"gains": "", "mask": {"causal": True}},
}  # fmt: skip


NARROW = {"causal, K < V", "every key, T > S", "packed, window, GQA", "widths 72 and 136", "no gain"}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(CASES, NARROW), ids=str)
def test_output_and_gradients_match_float64(name, dtype):
    check(build(dtype, **CASES[name]))


@st.composite
def cases(draw):
    """Small shapes under any combination of the mask's arguments."""
    sizes = draw(masks(20))
    square = sizes["mask"]["causal"] or sizes["queries"] == sizes["keys"]
    gains = draw(st.sampled_from(["abgl", "bg", "g"])) if square else "bg"
    return build(heads=1, groups=1, width=8, gains=gains, **sizes)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_mask(case):
    check(case)


def test_softmax_output_and_log_sum_exp():
    case = build(torch.float32, batch=2, gains="abg", mask={"causal": True, "key_lengths": lengths(0, 33)})
    _, a, lse = forward(case)
    scores = case.operands["q"].double() @ case.operands["k"].double().mT / 4
    seen = (
        torch.ones(40, 40, dtype=torch.bool).tril()
        & (torch.arange(40) < 33)
        & (torch.arange(40) < 33)[:, None]
    )
    scores = scores[1].masked_fill(~seen, float("-inf"))
    exact = scores.logsumexp(-1)
    assert torch.equal(exact.isinf(), lse[1].cpu().isinf())
    assert_accurate(lse[1, :, :33].cpu(), exact[:, :33], exact[:, :33].float())
    assert torch.equal(lse[0].cpu(), torch.full((2, 40), float("-inf")))
    assert not a[0].any() and not a[1, :, 33:].any()
    expected = scores.softmax(-1)[:, :33] @ case.operands["v"][1].double()
    plain = scores.float().softmax(-1)[:, :33] @ case.operands["v"][1]
    assert_accurate(a[1, :, :33].cpu(), expected, plain)


def test_views_are_read_in_place():
    case = build(torch.float32, batch=2, mask={"causal": True})
    expected = forward(case)
    for name in ("q", "k", "v", "v0"):
        x = case.operands[name]
        case.operands[name] = x.transpose(1, 2).flatten(2).unflatten(2, x.shape[1::2]).transpose(1, 2)
        assert not case.operands[name].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(forward(case), expected, strict=True))


def test_query_weights_zero_give_v():
    """Scores 0 make A = C V; with α = β = γ = 1 the block is the identity."""
    case = build(torch.float16, gains="abg", queries=80, keys=80, heads=1, groups=1, mask={"causal": True})
    case.operands |= {"alpha": torch.ones(1), "beta": torch.ones(1), "gamma": torch.ones(1)}
    case.operands["q"].zero_()
    assert torch.equal(forward(case)[0].cpu(), case.operands["v"])


def test_gradients_are_the_same_bits_every_time():
    case = build(torch.float16, queries=40, keys=40, mask={"causal": True})
    first = backward(case)
    for _ in range(100 if DEVICE == "cuda" else 2):
        assert all(torch.equal(x, first[name]) for name, x in backward(case).items())


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU nothing is widened")
def test_interpreter_widens_bfloat16():
    case = build(torch.bfloat16, mask={"causal": True})
    wide = build(torch.float32, mask={"causal": True})
    wide.operands = {name: None if x is None else x.float() for name, x in case.operands.items()}
    assert torch.equal(forward(case)[0], forward(wide)[0].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_hold_the_operands_and_divide_each_other(dtype):
    for key_width, width in itertools.product((8, 16, 100, 256), (8, 64, 130, 256)):
        for kind in itertools.product((False, True), repeat=3):
            found = {
                part: kernels.tiles(part, key_width, width, dtype, *kind)
                for part in ("forward", "keys", "queries")
            }
            assert all(tile["BLOCK_K"] >= key_width and tile["BLOCK_V"] >= width for tile in found.values())
            assert found["forward"]["BLOCK_M"] % found["forward"]["BLOCK_N"] == 0
