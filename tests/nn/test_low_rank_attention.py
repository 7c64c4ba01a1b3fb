"""Attention factorised from the start: its formula, its rank, and a cache of keys R wide."""

import copy

import pytest
import torch

from gaugekit import nn
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate


def made(dtype=torch.float64, rank=3, **options):
    module = nn.LowRankAttention(24, 3, rank, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def written_out(module, x):
    q, k, v = (p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (module.query, module.key, module.value))
    return module.output(reference(q, k, v, causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula_and_cached_decoding(dtype):
    module, x = made(dtype), torch.randn(2, 9, 24, dtype=dtype)
    with torch.no_grad():
        exact, naive = written_out(copy.deepcopy(module).double(), x.double()), written_out(module, x)
        assert_accurate(module(x), exact, naive)
        cache = nn.LayerCache()
        steps = [module(part, cache=cache) for part in (x[:, :4], *x[:, 4:].split(1, dim=1))]
        assert_accurate(torch.cat(steps, 1), exact, naive)
    assert cache.keys.shape[3] == 3 and cache.values.shape[3] == 8


def test_it_trains_and_its_scores_have_that_rank():
    module, x = made(rotary_base=100.0, rank=2, groups=1), torch.randn(1, 6, 24, dtype=torch.float64)
    module(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    product = module.query.weight.unflatten(0, (3, 2)).mT @ module.key.weight
    assert torch.linalg.matrix_rank(product).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="key_width"):
        nn.LowRankAttention(24, 3, 3, rotary_base=100.0)
