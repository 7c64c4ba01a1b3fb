"""The fused operator's composition, and what plan chooses for a GPU; no GPU and no triton needed but where said."""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gaugekit as gk
from gaugekit.ops.shaped_attention import fused
from gaugekit.ops.shaped_attention.choice import gpu_core
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
NOTHING = (None, None, None, None, None)
SCALE = 0.4
MASKS = {
    "none": (False, None, None, None, None),
    "causal": (True, None, None, None, None),
    "window": (False, 2, None, None, None),
    "all": (True, 3, torch.tensor([-1, 2]), torch.tensor([9, 6]), None),
}
NAMES = ("causal", "window", "query_start", "key_lengths", "cu_seqlens")


def make(dtype=torch.float64, batch=2, queries=9, keys=9, shaped=True, groups=2):
    heads = 2 * groups
    shapes = [(batch, heads, queries, 5), (batch, groups, keys, 5), (batch, groups, keys, 3)]
    qkv = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if not shaped:
        return *qkv, *NOTHING
    alpha, beta, gamma, lam = (torch.randn(heads, dtype=dtype, requires_grad=True) for _ in range(4))
    v0 = torch.randn(batch, groups, queries, 3, dtype=dtype, requires_grad=True)
    return *qkv, alpha, beta, gamma, v0, lam


def call(*operands):
    return torch.ops.gaugekit.shaped_attention(*operands)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_composition_matches_the_reference(mask, dtype):
    q, k, v, *terms = make(dtype)
    names = ("alpha", "beta", "gamma", "v0", "lam")
    options = {"scale": SCALE, **dict(zip(NAMES, MASKS[mask], strict=True))}
    given = dict(zip(("q", "k", "v", *names), (q, k, v, *terms), strict=True))
    exact = reference(**{name: x.detach().double() for name, x in given.items()}, **options)
    naive = reference(**{name: x.detach() for name, x in given.items()}, **options)
    out, a, lse = call(q, k, v, *terms, *MASKS[mask], SCALE)
    assert_accurate(out.detach(), exact, naive)
    assert not a.requires_grad and not lse.requires_grad
    assert torch.equal(lse.isinf()[..., None].expand_as(a), a == 0)


@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(mask):
    operands = make(groups=1)  # a finite difference a number: few of them
    assert torch.autograd.gradcheck(lambda *x: call(*x, *MASKS[mask], SCALE)[0], operands)


def test_blocks_of_queries_change_nothing(monkeypatch):
    operands = (*make(), *MASKS["all"], SCALE)
    whole = call(*operands)
    monkeypatch.setattr(fused, "BLOCK", 4)
    for x, y in zip(call(*operands), whole, strict=True):
        assert_accurate(
            x.detach().nan_to_num(neginf=0), y.detach().nan_to_num(neginf=0), y.detach().nan_to_num()
        )


@pytest.mark.parametrize("shaped", [True, False])
@pytest.mark.parametrize("mask", ["none", "all"])
def test_opcheck(shaped, mask):
    torch.library.opcheck(
        torch.ops.gaugekit.shaped_attention.default,
        (*make(torch.float32, shaped=shaped), *MASKS[mask], SCALE),
    )


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"keys": 0}, {"batch": 0}])
def test_empty(sizes):
    operands = make(torch.float32, shaped=False, **sizes)
    out, a, lse = call(*operands, *MASKS["causal"], SCALE)
    assert out.shape == (*operands[0].shape[:3], 3) and not out.any() and not a.any()
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    out.sum().backward()
    assert all(not x.grad.any() for x in operands[:3])


BF16, FP32 = torch.bfloat16, torch.float32
CHOICES = [
    ((BF16, 4096, 4096, 128, 128, "is_causal", True), "torch"),
    ((BF16, 4096, 4096, 64, 64, "is_causal", True), "fused"),
    ((BF16, 4096, 4096, 32, 128, "is_causal", True), "fused"),
    ((BF16, 1024, 1024, 128, 128, "is_causal", True), "fused"),
    ((BF16, 4096, 4096, 128, 128, "blocks", True), "fused"),
    ((BF16, 4096, 4096, 128, 128, "sequences", True), "fused"),
    ((BF16, 1, 8192, 64, 64, "none", True), "torch"),
    ((BF16, 4096, 4096, 64, 320, "blocks", True), "torch"),
    ((FP32, 4096, 4096, 128, 128, "is_causal", True), "fused"),
    ((FP32, 4096, 4096, 256, 256, "is_causal", True), "torch"),
    ((torch.float64, 64, 64, 16, 16, "none", True), "torch"),
    ((BF16, 4096, 4096, 64, 64, "is_causal", False), "torch"),
    ((BF16, 4096, 4096, 32, 64, "is_causal", False), "fused"),
]


@needs_triton
@pytest.mark.parametrize(("arguments", "core"), CHOICES)
def test_core_on_a_gpu(arguments, core):
    assert gpu_core(*arguments) == core


@needs_triton
def test_plan_for_a_gpu_names_cores_and_tiles():
    with FakeTensorMode():
        x = torch.empty(2, 4, 4096, 128, device="cuda", dtype=BF16)
        gain = torch.ones(4, device="cuda")
        uses = gk.ops.shaped_attention.plan(x, x, x, alpha=gain, causal=True)
        assert uses.core.endswith(": CUDNN_ATTENTION, FLASH_ATTENTION, EFFICIENT_ATTENTION, MATH")
        assert uses.mask == "is_causal" and uses.combine and uses.tiles is None
        uses = gk.ops.shaped_attention.plan(x, x, x, alpha=gain, causal=True, window=100)
        assert uses.core == "fused" and not uses.combine
        assert set(uses.tiles) == {"forward", "keys", "queries"}
        out = gk.shaped_attention(x, x, x, alpha=gain, causal=True, window=100)
        assert out.shape == x.shape and out.transpose(1, 2).is_contiguous()
        assert gk.shaped_attention(x, x, x, alpha=gain, causal=True).shape == x.shape
