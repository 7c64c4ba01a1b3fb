"""Cached decoding, chunked prefill and batches of different lengths give what the full forward gives."""

import copy

import pytest
import torch

from gaugekit import nn
from helpers import assert_accurate

BLOCKS = {
    "SAS": (nn.SASBlock, {}),
    "SAS first layer": (nn.SASBlock, {"first": True}),
    "SAS-P": (nn.SASPBlock, {}),
    "SAS-P no norm": (nn.SASPBlock, {"norm": "none"}),
    "Pre-LN": (nn.PreLNBlock, {}),
    "groups": (nn.SASBlock, {"groups": 2}),
    "Pre-LN groups": (nn.PreLNBlock, {"groups": 2}),
    "rotary": (nn.SASBlock, {"rotary_base": 100.0, "key_width": 6}),
    "window": (nn.SASBlock, {"window": 3}),
    "window rotary": (nn.SASPBlock, {"window": 3, "rotary_base": 100.0}),
    "one cache": (nn.SASBlock, {"key_width": 6}),
    "one cache, first layer": (nn.SASBlock, {"first": True}),
    "one cache, groups": (nn.SASPBlock, {"groups": 2}),
    "one cache, no keys": (nn.SASBlock, {"key": False, "window": 3}),
    "one cache, Pre-LN": (nn.PreLNBlock, {}),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SPLITS = [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [4, 4, 4], [1, 9, 2], [12]]


def block(name, dtype):
    cls, options = BLOCKS[name]
    made = cls(16, 4, hidden=24, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    made.attention.single_cache = name.startswith("one cache")
    return made


def decoded(module, x, split, lengths=None):
    """The block's output, fed ``split`` columns at a time; ``lengths`` [len(split), B] are the real rows of each."""
    cache, parts, begin = nn.LayerCache(), [], 0
    for number, columns in enumerate(split):
        rows = None if lengths is None else lengths[number]
        parts.append(module(x[:, begin : begin + columns], cache=cache, lengths=rows))
        begin += columns
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_is_the_full_forward(name, dtype):
    module = block(name, dtype)
    x = torch.randn(3, 12, 16, dtype=dtype)
    with torch.no_grad():
        exact, full = copy.deepcopy(module).double()(x.double()), module(x)
        for split in SPLITS:
            out, cache = decoded(module, x, split)
            assert cache.columns == 12
            assert_accurate(out, exact, full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_batches_of_different_lengths(name, dtype):
    """Each call brings each sequence its own number of rows, none at times; what is padding is no one's business."""
    module = block(name, dtype)
    split = [5, 1, 3, 1, 1]
    lengths = torch.tensor([[5, 2, 0], [1, 1, 1], [3, 0, 2], [1, 1, 1], [0, 1, 1]])
    x, other = torch.randn(2, 3, 11, 16, dtype=dtype)
    real = torch.cat([torch.arange(n) < rows[:, None] for n, rows in zip(split, lengths, strict=True)], dim=1)
    with torch.no_grad():
        out, cache = decoded(module, x, split, lengths)
        assert cache.lengths.tolist() == [10, 5, 5]
        for row in range(3):
            alone = x[row][real[row]][None]
            exact = copy.deepcopy(module).double()(alone.double())
            assert_accurate(out[row][real[row]][None], exact, module(alone))
        again, _ = decoded(module, torch.where(real[..., None], x, other), split, lengths)
    assert torch.equal(again[real], out[real])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["SAS", "groups", "window rotary"])
def test_any_way_of_cutting(name, seed):
    """Random cuts, and random numbers of rows for each sequence of each call."""
    torch.manual_seed(seed)
    module = block(name, torch.float64)
    split = torch.randint(1, 5, (6,)).tolist()
    lengths = torch.stack([torch.randint(0, n + 1, (4,)) for n in split])
    real = torch.cat([torch.arange(n) < rows[:, None] for n, rows in zip(split, lengths, strict=True)], dim=1)
    x = torch.randn(4, sum(split), 16, dtype=torch.float64)
    with torch.no_grad():
        out, cache = decoded(module, x, split, lengths)
        assert cache.lengths.tolist() == real.sum(1).tolist()
        for row in range(4):
            full = module(x[row][real[row]][None])[0]
            torch.testing.assert_close(out[row][real[row]], full, rtol=1e-10, atol=1e-11)


def test_lengths_known_only_at_the_first_call():
    """A right-padded prompt, then one row a call for every sequence: what a server does."""
    module = block("SAS", torch.float64)
    prompt, rest = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    cache = nn.LayerCache()
    module(prompt, cache=cache, lengths=torch.tensor([6, 2]))
    out = torch.cat([module(rest[:, t : t + 1], cache=cache) for t in range(3)], dim=1)
    for row, length in enumerate((6, 2)):
        full = module(torch.cat([prompt[row, :length], rest[row]])[None])
        torch.testing.assert_close(out[row], full[0, length:], rtol=1e-11, atol=1e-12)


def test_select_and_crop():
    module = block("SAS", torch.float64)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        for lengths in (None, torch.tensor([7, 5])):
            cache = nn.LayerCache()
            module(x[:, :7], cache=cache, lengths=lengths)
            cache.crop(2)
            cache.select(torch.tensor([1, 1, 0]))
            out = module(x[[1, 1, 0], 7:8], cache=cache)
            for row, origin in enumerate((1, 1, 0)):
                past = 5 if lengths is None else int(lengths[origin]) - 2
                whole = module(torch.cat([x[origin, :past], x[origin, 7:8]])[None])
                torch.testing.assert_close(out[row, 0], whole[0, -1], rtol=1e-11, atol=1e-12)


def test_no_more_is_forgotten_than_there_is():
    cache = nn.LayerCache()
    cache.append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    for rows in (4, -1):
        with pytest.raises(ValueError, match=f"rows: expected 0 to 3, got {rows}"):
            cache.crop(rows)


def test_the_cache_writes_over_nothing_it_was_given():
    cache = nn.LayerCache()
    k, v = torch.randn(2, 1, 2, 4, 8), torch.randn(2, 1, 2, 4, 8)
    before = [x.clone() for x in (*k, *v)]
    cache.append(k[0], v[0])
    cache.crop(2)
    cache.append(k[1], v[1])
    for x, y in zip((*k, *v), before, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(cache.keys[:, :, : cache.columns], torch.cat([k[0][:, :, :2], k[1]], dim=2))


def test_gradients_flow_through_the_cache():
    module = block("SAS", torch.float64)
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 6, 16, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    full = torch.autograd.grad((module(x) * seed).sum(), inputs)
    out, _ = decoded(module, x, [3, 1, 2])
    for found, expected in zip(torch.autograd.grad((out * seed).sum(), inputs), full, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_a_step_does_not_read_the_cache_for_the_mean():
    """C comes from the running sum: values of the past changed behind its back leave it as it was."""
    module = nn.ShapedAttention(16, 4, dtype=torch.float64)
    with torch.no_grad():
        module.beta.zero_()
        x = torch.randn(1, 6, 16, dtype=torch.float64)
        cache = nn.LayerCache()
        module(x[:, :5], cache=cache)
        cache.values = torch.zeros_like(cache.values)
        out = module(x[:, 5:], cache=cache)
    torch.testing.assert_close(out[0, 0], x[0, 5] - x[0].mean(0), rtol=1e-12, atol=1e-12)


def test_the_running_sum_is_wide():
    """In bfloat16 4,096 ones would stop adding up at 256."""
    cache = nn.LayerCache()
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    cache.append(one.expand(1, 1, 4095, 1), one.expand(1, 1, 4095, 1))
    step = cache.append(one, one)
    assert cache.total.item() == 4096 and cache.total.dtype == torch.float32 and step.mean.item() == 1
