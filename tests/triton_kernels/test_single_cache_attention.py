"""The Triton kernels of single_cache_attention against the float64 oracle: masks, pages, splits, turned keys."""

import pytest
import torch

from gaugekit.ops.single_cache_attention.operator import fake
from gaugekit.reference.single_cache_attention import single_cache_attention as reference
from gaugekit.triton_kernels import single_cache_attention as kernels
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES, in_dtypes

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAMES = ("alpha", "beta", "gamma", "key_gain", "cos", "sin", "causal", "window", "query_start", "key_lengths",
         "block_table")  # fmt: skip
# batch, heads, groups, queries, rows, channels; slices, terms, pairs that turn; the mask
CASES = {
    "one token, slices": ((2, 4, 1, 1, 70, 32), True, "abg", 0, {"key_lengths": [70, 33]}),
    "one token, rows": ((1, 3, 1, 1, 40, 40), False, "", 0, {}),
    "turned keys": ((2, 4, 2, 3, 37, 24), False, "ab", 3, {"key_lengths": [37, 5]}),
    "odd slices": ((1, 3, 1, 2, 20, 33), True, "g", 0, {"window": 7}),
    "starts": ((2, 2, 2, 4, 30, 16), False, "abg", 8, {"query_start": [-2, 20], "key_lengths": [9, 23]}),
    "every key": ((2, 2, 1, 2, 18, 16), True, "g", 0, {"causal": False, "key_lengths": [18, 0]}),
    "many query rows": ((1, 4, 1, 18, 40, 16), True, "abg", 0, {}),
}


def operands(name, dtype):
    (batch, heads, groups, queries, rows, width), slices, terms, pairs, mask = CASES[name]
    q = torch.randn(batch, heads, queries, width).to(dtype)
    cache = (torch.randn(batch, groups, rows, width) + 0.25).to(dtype)
    options = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in mask.items()}
    options |= {n: torch.randn(heads) for n in ("alpha", "beta", "gamma") if n[0] in terms}
    if pairs:
        angle = torch.randn(rows, pairs)
        options |= {"cos": angle.cos(), "sin": angle.sin(), "key_gain": torch.randn(width)}
    return q, cache, slices, options


def launch(q, cache, slices, options, scale=0.3):
    """As the operator is called: the public function has said where the queries begin."""
    o = {"causal": True, **options}
    if o["causal"] and o.get("query_start") is None and o.get("key_lengths") is not None:
        o["query_start"] = o["key_lengths"] - q.shape[2]
    given = [o.get(name) for name in NAMES]
    here = [x.to(DEVICE) if torch.is_tensor(x) else x for x in given]
    out = torch.full_like(fake(q, cache, slices), float("nan"), device=DEVICE)
    kernels.single_cache_attention(q.to(DEVICE), cache.to(DEVICE), slices, *here, scale, out)
    return out.cpu()


def assert_right(q, cache, slices, options, out):
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact = reference(q.double(), cache.double(), slices=slices, scale=0.3, **wide)
    assert_accurate(out, exact, reference(q, cache, slices=slices, scale=0.3, **options))


@pytest.mark.parametrize("name, dtype", in_dtypes(CASES, {"one token, slices", "turned keys"}), ids=str)
def test_against_the_reference(name, dtype):
    q, cache, slices, options = operands(name, dtype)
    assert_right(q, cache, slices, options, launch(q, cache, slices, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_are_added_up(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", 64)
    (q, cache, slices, options) = operands("one token, slices", dtype)
    cache = torch.cat([cache, torch.randn_like(cache), torch.full_like(cache, float("nan"))], 2)
    options["key_lengths"] = torch.tensor([140, 97])
    out = launch(q, cache, slices, options)
    assert_right(q, cache[:, :, :140], slices, options, out)
    windowed = {**options, "window": 50}
    assert_right(q, cache[:, :, :140], slices, windowed, launch(q, cache, slices, windowed))


def test_pages_and_strides_give_the_same_bits():
    q, cache, slices, options = operands("one token, slices", torch.float32)
    expected = launch(q, cache, slices, options)
    order = torch.randperm(14).view(2, 7)
    pool = torch.empty(14, 1, 10, 32)
    for b in range(2):
        pool[order[b]] = cache[b].unflatten(1, (7, 10)).transpose(0, 1)
    order[1, 4:] = 1 << 30  # past the second sequence's 33 rows
    assert torch.equal(launch(q, pool, slices, {**options, "block_table": order.int()}), expected)
    view = cache.repeat_interleave(2, 3)[..., ::2].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(launch(q.mT.contiguous().mT, view, slices, options), expected)
