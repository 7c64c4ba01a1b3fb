"""The Triton kernels of the attention with a rank of its own for each head, against its composition."""

import pytest
import torch

from gaugekit.ops.ragged_attention import operator as ops
from gaugekit.triton_kernels.ragged_attention import launches
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CASES = {
    "causal, three tiles": ([3, 40, 16, 24], 1, 24, (True, None, None, None, None)),
    "GQA, query_start, lengths": (
        [5, 20],
        2,
        16,
        (True, None, torch.tensor([-2, 3]), torch.tensor([40, 31]), None),
    ),
    "window on both sides": ([9, 17], 1, 16, (False, 7, None, None, None)),
    "packed": ([4, 18], 1, 16, (True, None, None, None, torch.tensor([0, 0, 13, 40], dtype=torch.int32))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, dtype):
    ranks, repeats, width, mask = CASES[name]
    if dtype != torch.float32 and name != "causal, three tiles":
        pytest.skip("one case shows the narrow types")
    batch = 1 if mask[4] is not None else 2
    mask = tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in mask)
    shapes = [(batch, 40, sum(ranks) * repeats), (batch, 40, sum(ranks)), (batch, len(ranks), 40, width)]
    q, k, v = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    rest = (ranks, *mask, 0.3)
    found, naive = ops._triton(q, k, v, *rest), ops.composition(q, k, v, *rest)
    exact = ops.composition(q.double(), k.double(), v.double(), *rest)
    for x, y, z in zip(found, exact, naive, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (z.shape, z.dtype, z.stride())
        x, y, z = (part.cpu().nan_to_num(neginf=0) for part in (x, y, z))
        assert_accurate(x, y.to(torch.float64), z, ulps=32)
    grad = torch.randn(naive[0].shape, device=DEVICE).to(dtype)
    found = ops._triton_backward(grad, q, k, v, *naive, *rest)
    plain = ops.composition_backward(grad, q, k, v, *naive, *rest)
    exact = ops.composition_backward(grad.double(), q.double(), k.double(), v.double(), *exact, *rest)
    for x, y, z in zip(found, exact, plain, strict=True):
        assert_accurate(x.cpu(), y.cpu(), z.cpu(), ulps=64)


def test_heads_are_grouped_by_tile():
    assert launches([3, 40, 16, 24, 128]) == [(16, [0, 2]), (32, [3]), (64, [1]), (128, [4])]
