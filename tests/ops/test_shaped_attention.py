"""shaped_attention against the float64 reference: every mask, every dtype, widths, groups, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import gaugekit as gk
from gaugekit.ops.shaped_attention import core
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate
from masks import draw_mask

GAINS = ("alpha", "beta", "gamma", "lam")


def make(dtype, batch=2, heads=4, groups=2, queries=33, keys=33, score_width=16, width=16, terms=()):
    shapes = {
        "q": (batch, heads, queries, score_width),
        "k": (batch, groups, keys, score_width),
        "v": (batch, groups, keys, width),
    }
    shapes |= {name: (heads,) if name in GAINS else (batch, groups, queries, width) for name in terms}
    return {
        name: torch.randn(shape).to(torch.float32 if name in GAINS else dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def gradients_of(function, operands, options, weight):
    out = function(**operands, **options)
    return out.detach(), torch.autograd.grad(
        out, operands.values(), weight.to(out.dtype), materialize_grads=True
    )


def flat(gradients):
    """dq, dk and dv in one row, with one scale: where each query sees one key dq and dk are differences that vanish."""
    return torch.cat([x.flatten() for x in gradients])


def compare(operands, **options):
    dtype = operands["q"].dtype
    weight = torch.randn(*operands["q"].shape[:3], operands["v"].shape[3])
    results = {
        name: gradients_of(
            function, {n: x.detach().to(to).requires_grad_() for n, x in operands.items()}, options, weight
        )
        for name, function, to in (("ref", reference, torch.float64), ("naive", reference, dtype))
    }
    out, gradients = gradients_of(gk.shaped_attention, operands, options, weight)
    assert out.dtype == dtype
    assert_accurate(out, results["ref"][0], results["naive"][0])
    assert [x.dtype for x in gradients] == [x.dtype for x in operands.values()]
    found, ref, naive = ([flat(x[:3]), *x[3:]] for x in (gradients, results["ref"][1], results["naive"][1]))
    for x, exact, plain in zip(found, ref, naive, strict=True):
        coarser = (
            dtype if dtype.itemsize < x.dtype.itemsize else x.dtype
        )  # float32 gains beside a core in bfloat16
        assert_accurate(x.to(coarser), exact, plain.to(coarser))
    with torch.no_grad():  # the form that writes over the core's output
        assert_accurate(gk.shaped_attention(**operands, **options), results["ref"][0], results["naive"][0])


SHAPED = ("alpha", "beta", "gamma", "v0", "lam")
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "causal lengths": {"causal": True, "key_lengths": torch.tensor([20, 33])},
    "lengths": {"key_lengths": torch.tensor([5, 33])},
    "window": {"window": 4},
    "causal window": {"causal": True, "window": 4},
    "start": {"causal": True, "query_start": torch.tensor([0, 3])},
    "all": {
        "causal": True,
        "window": 7,
        "query_start": torch.tensor([2, -3]),
        "key_lengths": torch.tensor([33, 0]),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [(), SHAPED])
def test_masks_and_dtypes(mask, dtype, terms):
    compare(make(dtype, terms=terms), **MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("widths", [(8, 16), (16, 8), (1, 3), (40, 33)])
def test_widths_of_scores_and_values_differ(dtype, widths):
    """Padding to the wider leaves the scale at K^-0.5 and the result at V channels, owning its memory."""
    operands = make(dtype, score_width=widths[0], width=widths[1], terms=("alpha", "gamma"))
    compare(operands, causal=True)
    compare({name: operands[name] for name in "qkv"}, causal=True, scale=0.3)
    out = gk.shaped_attention(*(operands[name].detach() for name in "qkv"))
    assert out.shape[3] == widths[1] and out.untyped_storage().nbytes() == out.numel() * out.element_size()


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 3), (6, 6)])
def test_groups(heads):
    compare(make(torch.float32, heads=heads[0], groups=heads[1], terms=SHAPED), causal=True)


@pytest.mark.parametrize("shape", [(1, 33), (7, 33), (33, 7), (0, 5), (5, 0), (1, 1)])
@pytest.mark.parametrize("terms", [(), SHAPED])
def test_queries_and_keys_of_different_number(shape, terms):
    compare(make(torch.float32, queries=shape[0], keys=shape[1], terms=terms), causal=True)


@st.composite
def problems(draw):
    causal = draw(st.booleans())
    batch, groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 30))
    terms = draw(st.sampled_from([(), ("gamma",), SHAPED]))
    queries = keys if "alpha" in terms and not causal else draw(st.integers(1, 30))
    mask = draw_mask(draw, causal, batch, queries, keys)
    sizes = dict(score_width=draw(st.integers(1, 4)), width=draw(st.integers(1, 4)))
    return make(torch.float32, batch, groups * per_group, groups, queries, keys, terms=terms, **sizes), mask


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(problem=problems(), block=st.sampled_from([4, 1024]))
def test_every_mask(problem, block):
    operands, mask = problem
    saved = core.BLOCK, core.SMALLEST_BLOCK
    core.BLOCK = core.SMALLEST_BLOCK = block
    try:
        compare(operands, **mask)
    finally:
        core.BLOCK, core.SMALLEST_BLOCK = saved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beta_alone_is_torch_attention(dtype):
    operands = make(dtype)
    q, k, v = (operands[name].detach() for name in "qkv")
    plain = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(gk.shaped_attention(q, k, v, causal=True), plain)
    assert torch.equal(gk.shaped_attention(q, k, v, beta=torch.ones(4), causal=True), plain)


def test_lambda_pulls_towards_the_first_values():
    operands = make(torch.float64, heads=2)
    q, k, v = (operands[name].detach() for name in "qkv")
    v0 = torch.randn_like(v)
    plain = gk.shaped_attention(q, k, v, causal=True)
    out = gk.shaped_attention(q, k, v, v0=v0, lam=torch.full((2,), 0.5), causal=True)
    assert_accurate(out, plain + 0.5 * (v0 - v), out)


def test_long_masks_are_cut_into_blocks(monkeypatch):
    """No mask covers more than 1,024 queries, nor keys that its block cannot see."""
    seen = []

    def spy(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2], tuple(options["attn_mask"].shape)))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(core, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 1, 1500, 8)
    ref = reference(q.double(), q.double(), q.double(), causal=True, window=200)
    naive = reference(q, q, q, causal=True, window=200)
    assert_accurate(gk.shaped_attention(q, q, q, causal=True, window=200), ref, naive)
    assert max(keys for _, keys, _ in seen) == 399 and sum(queries for queries, _, _ in seen) == 1500
    seen.clear()
    gk.shaped_attention(q[:, :, :1200], q, q, causal=True)
    assert seen == [(1024, 1324, (1024, 1324)), (176, 1500, (176, 1500))]


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("terms", [{}, {"gamma": 0.5}])
def test_where_there_is_nothing_gradients_are_zeros_and_not_none(sizes, terms):
    """Of a rank that has no sequence, say: None would leave the others waiting."""
    batch, queries, keys = sizes
    q = torch.randn(batch, 4, queries, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, 8, requires_grad=True) for _ in range(2))
    out = gk.shaped_attention(q, k, v, **terms)
    assert out.shape == q.shape and not out.any()
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))
