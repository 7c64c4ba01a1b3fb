"""FlexAttention as the softmax core: every mask and width against float64, plan, compile; gradients where a GPU is."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.ops.shaped_attention import operator as op
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate

TERMS = ("alpha", "beta", "gamma")
MASKS = {
    "lengths": {"key_lengths": torch.tensor([5, 150])},
    "window": {"window": 20},
    "all": {
        "causal": True,
        "window": 140,
        "query_start": torch.tensor([2, -3]),
        "key_lengths": torch.tensor([150, 0]),
    },
    "packed": {"causal": True, "cu_seqlens": torch.tensor([0, 60, 150], dtype=torch.int32)},
}


def make(batch=2, rows=150, dtype=torch.float32, device="cpu"):
    shapes = {"q": (batch, 4, rows, 16), "k": (batch, 2, rows, 16), "v": (batch, 2, rows, 32)}
    random = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    return random | {name: torch.randn(4, device=device) for name in TERMS}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    operands = make(batch=1 if mask == "packed" else 2)
    with op.use_core("flex"):
        out = gk.shaped_attention(**operands, **MASKS[mask])
    ref = reference(**{name: x.double() for name, x in operands.items()}, **MASKS[mask])
    assert_accurate(out, ref, reference(**operands, **MASKS[mask]))


def test_plan_says_what_was_asked_for():
    operands = make()
    table = op.plan(**operands, causal=True)
    with op.use_core("torch"):
        torchs = op.plan(**operands, causal=True)
        assert torchs.core == "torch scaled_dot_product_attention"
    with op.use_core("flex"):
        assert op.plan(**operands, causal=True) == op.Plan("flex", "is_causal", 150, 32, True)
        with op.use_core("torch"):
            assert op.plan(**operands, causal=True) == torchs
    assert op.plan(**operands, causal=True) == table
    message = "^core: expected 'torch', 'ragged', 'fused' or 'flex', got 'cudnn'"
    with pytest.raises(ValueError, match=message), op.use_core("cudnn"):
        pass


def test_the_fused_operator_can_be_asked_for_anywhere():
    operands = {name: x.requires_grad_() for name, x in make().items()}
    weight, found = torch.randn(2, 4, 150, 32), {}
    for core in ("torch", "fused"):
        with op.use_core(core):
            out = gk.shaped_attention(**operands, causal=True)
        found[core] = [out.detach(), *torch.autograd.grad(out, operands.values(), weight)]
    for x, y in zip(found["fused"], found["torch"], strict=True):
        assert_accurate(x, y.double(), y, ulps=64)


def test_fullgraph_compile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.shaped_attention, backend=counter, fullgraph=True)
    operands = make()
    with op.use_core("flex"), torch.no_grad():
        out = compiled(**operands, causal=True)
    plain = gk.shaped_attention(**operands, causal=True)
    assert counter.frame_count == 1
    assert_accurate(out, plain.double(), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_a_gpu(mask, dtype):
    operands = make(1 if mask == "packed" else 2, dtype=dtype, device="cuda")
    here = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in MASKS[mask].items()}
    weight, found = torch.randn(operands["q"].shape[0], 4, 150, 32), []
    for function, kind, place in (
        (gk.shaped_attention, None, "cuda"),
        (reference, torch.float64, "cpu"),
        (reference, dtype, "cpu"),
    ):
        leaves = {n: x.detach().to(place, kind or x.dtype).requires_grad_() for n, x in operands.items()}
        with op.use_core("flex"):
            out = function(**leaves, **(here if place == "cuda" else MASKS[mask]))
        gradients = torch.autograd.grad(out, leaves.values(), weight.to(out.device, out.dtype))
        found.append([out.detach().cpu(), *(x.cpu() for x in gradients)])
    for x, ref, naive in zip(*found, strict=True):
        assert_accurate(x, ref, naive)
