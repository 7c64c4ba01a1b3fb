"""Attention with a rank of its own for each head: against the reference, in every layout, with every option."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.ops.ragged_attention.layout import buckets, gather, spread
from gaugekit.reference.ragged_attention import ragged_attention as reference
from gaugekit.reference.shaped_attention import shaped_attention
from helpers import assert_accurate

MASKS = {
    "none": (False, None, None, None, None),
    "causal": (True, None, None, None, None),
    "all": (True, 3, torch.tensor([-1, 2]), torch.tensor([9, 6]), None),
}
NAMES = ("causal", "window", "query_start", "key_lengths", "cu_seqlens")
# ranks beside V = 6: all narrower; one as wide, one wider; equal; one head
RANKS = {"narrow": [2, 5, 1], "wide": [3, 6, 9], "equal": [4, 4], "one": [7]}


def make(ranks, dtype=torch.float64, repeats=2, tokens=9, shaped=True, grad=False):
    groups = len(ranks)
    shapes = [(2, tokens, sum(ranks) * repeats), (2, tokens, sum(ranks)), (2, groups, tokens, 6)]
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)
    terms = {}
    if shaped:
        for name in ("alpha", "beta", "gamma", "lam"):
            terms[name] = torch.randn(groups * repeats, dtype=dtype, requires_grad=grad)
        terms["v0"] = torch.randn(2, groups, tokens, 6, dtype=dtype, requires_grad=grad)
    return q, k, v, terms


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS)
def test_matches_the_reference(ranks, dtype, mask):
    q, k, v, terms = make(RANKS[ranks], dtype)
    options = {"scale": 0.4, **dict(zip(NAMES, MASKS[mask], strict=True))}
    wide = {name: x.double() for name, x in terms.items()}
    exact = reference(q.double(), k.double(), v.double(), RANKS[ranks], **wide, **options)
    naive = reference(q, k, v, RANKS[ranks], **terms, **options)
    assert_accurate(gk.ragged_attention(q, k, v, RANKS[ranks], **terms, **options), exact, naive)


def test_the_reference_is_attention_head_by_head_and_equal_ranks_are_shaped_attention():
    q, k, v, terms = make([4, 4])
    dense_q, dense_k = q.unflatten(2, (4, 4)).transpose(1, 2), k.unflatten(2, (2, 4)).transpose(1, 2)
    expected = shaped_attention(dense_q, dense_k, v, **terms, scale=0.3, causal=True)
    torch.testing.assert_close(reference(q, k, v, [4, 4], **terms, scale=0.3, causal=True), expected)
    ones = torch.ones(
        1, 1, 3, dtype=torch.float64
    )  # two heads of ranks 1 and 2: scores 1 and 2 for every key
    v = torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(1, 2, 2, 1)
    out = reference(ones, ones.expand(1, 2, 3), v, [1, 2], scale=1.0)
    torch.testing.assert_close(out, torch.full((1, 2, 1, 1), 2.0, dtype=torch.float64))


def test_layouts():
    assert buckets([2, 6, 9, 17, 16], 6) == [(6, [0, 1]), (16, [2, 4]), (32, [3])]
    q, _, _, _ = make([2, 5, 1])
    dense = spread(q, [2, 5, 1], 2, [0, 1, 2], 6)
    assert dense.shape == (2, 6, 9, 6) and dense[:, 0, :, 2:].count_nonzero() == 0
    assert torch.equal(gather(dense, [2, 5, 1], 2), q)


def call(q, k, v, ranks, mask):
    return torch.ops.gaugekit.ragged_attention(q, k, v, ranks, *MASKS[mask], 0.4)


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_gradcheck(mask):
    q, k, v, terms = make([2, 7], tokens=5, grad=True)
    if mask == "all":
        q, k, v, terms = make([2, 7], tokens=9, grad=True)
    options = {"scale": 0.4, **dict(zip(NAMES, MASKS[mask], strict=True))}
    names = list(terms)
    assert torch.autograd.gradcheck(
        lambda q, k, v, *x: gk.ragged_attention(
            q, k, v, [2, 7], **dict(zip(names, x, strict=True)), **options
        ),
        (q, k, v, *terms.values()),
        fast_mode=True,
    )
    assert torch.autograd.gradcheck(lambda *x: call(*x, [2, 7], mask)[0], (q, k, v), fast_mode=True)


@pytest.mark.parametrize("mask", ["none", "all"])
@pytest.mark.parametrize("ranks", ["narrow", "one"])
def test_opcheck(ranks, mask):
    q, k, v, _ = make(RANKS[ranks], torch.float32, grad=True)
    operands = (q, k, v, RANKS[ranks], *MASKS[mask], 0.4)
    torch.library.opcheck(torch.ops.gaugekit.ragged_attention.default, operands)
    plain = [x.detach() for x in (q, k, v)]
    strided = (
        plain[0].mT.contiguous().mT,
        plain[1].repeat_interleave(2, 1)[:, ::2],
        plain[2].transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not any(x.is_contiguous() for x in strided[: 2 if len(RANKS[ranks]) == 1 else 3])
    torch.library.opcheck(torch.ops.gaugekit.ragged_attention.default, (*strided, *operands[3:]))
    for found, expected in zip(
        torch.ops.gaugekit.ragged_attention(*strided, *operands[3:]),
        torch.ops.gaugekit.ragged_attention(*plain, *operands[3:]),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_empty():
    for tokens in (0, 4):
        q, k, v, _ = make([2, 3], torch.float32, tokens=tokens, grad=True)
        q = q if tokens == 0 else q[:, :0]
        out, lse = call(q, k, v, [2, 3], "none")
        assert out.shape == (2, 4, 0, 6) and lse.shape == (2, 4, 0)
        out.sum().backward()


@pytest.mark.parametrize("public", [True, False])
def test_compile(public):
    counter = CompileCounterWithBackend("aot_eager")
    q, k, v, terms = make([2, 9], torch.float32, grad=True)

    def run(q, k, v):
        if public:
            return gk.ragged_attention(q, k, v, [2, 9], **terms, scale=0.4, causal=True)
        return call(q, k, v, [2, 9], "causal")[0]

    out = torch.compile(run, fullgraph=True, backend=counter)(q, k, v)
    assert counter.frame_count == 1
    torch.testing.assert_close(out, run(q, k, v))
    out.sum().backward()
    assert q.grad.abs().sum() > 0


def test_bad_input():
    q, k, v, _ = make([2, 5])
    for changes, message in (
        ({"ranks": [2, 0]}, "ranks: expected one from 1"),
        ({"ranks": [2]}, "ranks: expected one from 1 for each key head"),
        ({"k": k[..., :-1]}, r"k: expected \[B, S, ΣR\] = \[2, 9, 7\]"),
        ({"q": q[..., :-1]}, "q: expected .* a multiple of 7"),
        ({"q": q.float()}, "q: expected .* torch.float64"),
        ({"beta": torch.ones(3)}, "beta"),
        ({"window": 0}, "window"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.ragged_attention(**{"q": q, "k": k, "v": v, "ranks": [2, 5], "scale": 1.0, **changes})
