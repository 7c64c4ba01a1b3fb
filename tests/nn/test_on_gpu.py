"""Blocks on a GPU: forward, gradients and decoding against float64 on the CPU."""

import copy

import pytest
import torch

from gaugekit import nn
from helpers import assert_accurate

pytestmark = pytest.mark.gpu
BLOCKS = {
    "SAS": (nn.SASBlock, {}),
    "SAS-P": (nn.SASPBlock, {"norm": "none"}),
    "Pre-LN": (nn.PreLNBlock, {}),
    "groups rotary": (nn.SASBlock, {"groups": 2, "rotary_base": 1e4}),
    "window": (nn.SASBlock, {"window": 40}),
}


def block(name, dtype):
    cls, options = BLOCKS[name]
    made = cls(256, 4, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made, copy.deepcopy(made).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_forward_and_decoding(name, dtype):
    exact, narrow = block(name, dtype)
    x = torch.randn(2, 150, 256).to(dtype)
    device = copy.deepcopy(narrow).cuda()
    with torch.no_grad():
        expected, naive = exact(x.double()), narrow(x)
        assert_accurate(device(x.cuda()).cpu(), expected, naive)
        for lengths in (None, torch.tensor([100, 37])):
            cache, parts = nn.LayerCache(), []
            for begin, end in ((0, 100), (100, 101), (101, 130), (130, 131)):
                rows = lengths.cuda() if begin == 0 and lengths is not None else None
                parts.append(device(x[:, begin:end].cuda(), cache=cache, lengths=rows).cpu())
            out = torch.cat(parts, dim=1)
            for row in range(2):
                real = torch.ones(131, dtype=torch.bool)
                if lengths is not None:
                    real[lengths[row] : 100] = False
                alone = x[row, :131][real][None]
                assert_accurate(out[row][real][None], exact(alone.double()), narrow(alone))


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients(name):
    exact, narrow = block(name, torch.float32)
    device = copy.deepcopy(narrow).cuda()
    x = torch.randn(2, 70, 256)
    seed = torch.randn(2, 70, 256)
    grads = [
        torch.autograd.grad((module(y) * s).sum(), list(module.parameters()))
        for module, y, s in (
            (device, x.cuda(), seed.cuda()), (exact, x.double(), seed.double()), (narrow, x, seed),
        )
    ]  # fmt: skip
    for ours, expected, naive in zip(*grads, strict=True):
        assert_accurate(ours.cpu(), expected, naive)
