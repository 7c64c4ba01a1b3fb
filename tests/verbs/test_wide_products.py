"""Products by way of float32: rounded once, nothing else touched."""

import pytest
import torch

from gaugekit.verbs.wide_products import _WideProducts, wide_products

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_product_is_rounded_once(dtype):
    x, w, bias = torch.randn(3, 7, 50).to(dtype), torch.randn(9, 50).to(dtype), torch.randn(9).to(dtype)
    expected = {
        "linear": (x.float() @ w.float().T).to(dtype),
        "with bias": (x.float() @ w.float().T + bias.float()).to(dtype),
        "batched": (x.float() @ x.float().mT).to(dtype),
    }
    with torch.no_grad(), _WideProducts(dtype):
        given = {
            "linear": torch.nn.functional.linear(x, w),
            "with bias": torch.nn.functional.linear(x, w, bias),
            "batched": x @ x.mT,
        }
    for name in expected:
        assert given[name].dtype == dtype
        # float32 sums of 50 terms in another order: two ulp of 16 bits where they straddle a rounding edge
        limit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(given[name], expected[name], rtol=limit, atol=limit)
    # The sum in 16 bits would be seen: 1 + 256 halves of an ulp are lost there one by one.
    ones = torch.full((1, 257), torch.finfo(dtype).eps / 2, dtype=dtype)
    ones[0, 0] = 1
    with torch.no_grad(), _WideProducts(dtype):
        total = ones @ torch.ones(257, 1, dtype=dtype)
    assert total.item() == torch.tensor(1 + 128 * torch.finfo(dtype).eps).to(dtype).item()


def test_other_dtypes_are_left_alone():
    x = torch.randn(5, 5, dtype=torch.float64)
    with torch.no_grad(), _WideProducts(torch.bfloat16):
        inside = x @ x
        half = (x.half() @ x.half()).dtype
    assert torch.equal(inside, x @ x) and half == torch.float16


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_processor_with_its_own_products_keeps_them(dtype, monkeypatch):
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    for native in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda answer=native: answer)
        assert isinstance(wide_products(dtype), _WideProducts) is not native
    assert not isinstance(wide_products(torch.float32), _WideProducts)
