"""torch's own choice of an attention kernel on a GPU, which forced determinism would take from it: cuDNN first."""

import pytest
import torch

import gaugekit as gk
from gaugekit.ops.shaped_attention import plan, use_core
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def deterministic_and_poisoned():
    """In the place of the suite's fixture: under deterministic algorithms torch refuses cuDNN's attention."""
    torch.manual_seed(0)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gains", [False, True], ids=["softmax alone", "gains"])
def test_default_core_forward_and_backward(dtype, gains):
    q, k, v, weight = (torch.randn(2, 300, 4, 64).to(dtype).transpose(1, 2) for _ in range(4))
    given = {name: torch.ones(4) for name in ("alpha", "beta", "gamma")} if gains else {}
    results = []
    with use_core("torch"):
        here = [x.cuda().requires_grad_() for x in (q, k, v)]
        options = {name: gain.cuda() for name, gain in given.items()} | {"causal": True}
        assert "CUDNN_ATTENTION" in plan(*here, **options).core
        out = gk.shaped_attention(*here, **options)
        results.append([out, *torch.autograd.grad(out, here, weight.cuda())])
    for kind in (torch.float64, dtype):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = reference(*leaves, **given, causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, weight.to(out))])
    for found, exact, naive in zip(*results, strict=True):
        assert_accurate(found.detach().cpu(), exact.detach(), naive.detach())
