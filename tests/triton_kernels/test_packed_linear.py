"""The Triton product with packed weights against the float64 oracle: formats, odd sizes, splits, tiles, bad streams."""

import pytest
import torch
from torch.nn.functional import linear

from gaugekit.ops.packed_linear import pack_weight
from gaugekit.reference import packed_linear as reference
from gaugekit.triton_kernels.packed_linear import packed_linear
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def product(x, packed, bias=None):
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=DEVICE)
    here = [None if part is None else part.to(DEVICE) for part in (*packed[:5], bias)]
    packed_linear(out, x.to(DEVICE), *here)
    return out.cpu()


def matrix(n, k, kind):
    weight = torch.randn(n, k) * 0.02
    weight[torch.rand(n, k) < 0.02] *= 2**-9  # more escapes
    return weight.to(kind)


@pytest.mark.parametrize(
    ("batch", "n", "k", "kind", "code_bits"),
    [
        (1, 5, 1100, torch.bfloat16, 3),
        (1, 20, 70, torch.float16, 3),
        (3, 18, 70, torch.float16, 4),
        (3, 5, 1100, torch.bfloat16, 4),
        (60, 18, 70, torch.bfloat16, 3),
        (70, 66, 70, torch.bfloat16, 3),
        (130, 18, 70, torch.float16, 4),
        (1, 5, 1100, torch.float8_e5m2, 3),
        (3, 18, 70, torch.float8_e5m2, 4),
        (60, 18, 70, torch.float8_e5m2, 3),
    ],
)
def test_product(batch, n, k, kind, code_bits):
    weight = matrix(n, k, kind)
    packed, bias = pack_weight(weight, code_bits=code_bits), torch.randn(n)
    for dtype in {torch.float32, *DTYPES} & set(packed.operands):
        x = torch.randn(batch, k).to(dtype)
        exact = reference.packed_linear(x, *packed[:5], bias)
        assert_accurate(
            product(x, packed, bias.to(dtype)), exact, linear(x, weight.to(dtype), bias.to(dtype))
        )


def test_every_weight_is_decoded_bit_for_bit():
    """Rows of the identity pick single weights, so nothing is rounded."""
    for kind in (torch.bfloat16, torch.float16, torch.float8_e5m2):
        weight = matrix(9, 70, kind)
        assert torch.equal(product(torch.eye(70), pack_weight(weight)), weight.float().T)


def test_a_bias_may_have_a_stride():
    """Its values as a column of a matrix give the bits that the same values give side by side."""
    packed, x = pack_weight(matrix(9, 70, torch.bfloat16)), torch.randn(3, 70)
    columns = torch.randn(9, 4)
    assert torch.equal(product(x, packed, columns[:, 1]), product(x, packed, columns[:, 1].contiguous()))


def test_streams_that_end_too_soon_are_read_as_zeros():
    packed = pack_weight(matrix(4, 1100, torch.bfloat16))
    cut = packed._replace(escapes=packed.escapes[:0], offsets=packed.offsets - 7)
    assert product(torch.zeros(1, 1100), cut).shape == (1, 4)
