"""packed_experts: each group of rows against packed_linear's oracle with its own expert, gradients, and bad input."""

import pytest
import torch
from torch.nn.functional import linear

from gaugekit.ops.packed_linear import pack_weight, packed_experts, packed_linear
from gaugekit.reference import packed_linear as reference
from helpers import assert_accurate

COUNT, N, K = 4, 5, 70
ENDS = torch.tensor([3, 3, 23, 24])  # few rows, none, more than are decoded inside the product, one
ROWS = 26  # two behind the last expert's


def experts(dtype=torch.bfloat16, columns=K, code_bits=None):
    weight = (torch.randn(COUNT, N, columns) * 0.02).to(dtype)
    return weight, pack_weight(weight.flatten(0, 1), code_bits=code_bits)


def groups():
    begin = 0
    for expert, end in enumerate(ENDS.tolist()):
        yield expert, slice(begin, end)
        begin = end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [K, 1030])
def test_each_group_is_its_expert_s_product(dtype, columns):
    weight, packed = experts(dtype, columns, code_bits=3)
    assert packed.escapes.numel()
    for kind in (dtype, torch.float32, torch.float64):
        x = torch.randn(ROWS, columns).to(kind)
        y = packed_experts(x, packed, ENDS)
        assert y.shape == (ROWS, N) and y.dtype == kind and not y[24:].any()
        for expert, rows in groups():
            alone = pack_weight(weight[expert], code_bits=3)
            assert torch.equal(y[rows], packed_linear(x[rows], alone))
            exact = linear(x[rows].double(), weight[expert].double())
            assert_accurate(y[rows], exact, linear(x[rows], weight[expert].to(kind)))


def test_one_row_and_none():
    weight, packed = experts()
    x = torch.randn(1, K).bfloat16()
    last = torch.tensor([0, 0, 0, 1])
    y, alone = packed_experts(x, packed, last), pack_weight(weight[3])
    assert torch.equal(y, packed_linear(x, alone))
    assert_accurate(y, reference.packed_linear(x, *alone[:5]), linear(x, weight[3]))
    assert not packed_experts(x, packed, torch.zeros(COUNT, dtype=torch.int32)).any()
    assert packed_experts(x[:0], packed, torch.zeros(COUNT, dtype=torch.int64)).shape == (0, N)


def test_gradients():
    small = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    _, packed = experts(columns=5)
    ends = torch.tensor([2, 2, 4, 5])
    assert torch.autograd.gradcheck(lambda x: packed_experts(x, packed, ends), (small,))
    weight, packed = experts()
    x = torch.randn(ROWS, K, dtype=torch.float64, requires_grad=True)
    y = packed_experts(x, packed, ENDS)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not gradient[24:].any()
    for expert, rows in groups():
        expected = weight[expert].double().sum(0).expand(gradient[rows].shape)
        assert_accurate(gradient[rows], expected, expected)


@pytest.mark.parametrize("rows", [0, ROWS])
def test_opcheck(rows):
    _, packed = experts()
    ends = ENDS if rows else torch.zeros_like(ENDS)
    x = torch.randn(rows, K).bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.gaugekit.packed_experts.default, (x, ends, *packed[:5]))
    grad = torch.randn(rows, N).bfloat16()
    torch.library.opcheck(torch.ops.gaugekit.packed_experts_backward.default, (grad, ends, *packed[:5], K))


def test_compiles_in_one_graph():
    _, packed = experts()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(packed_experts, fullgraph=True, backend=backend, dynamic=True)
    for ends in (ENDS, ENDS.flip(0).cumsum(0)):
        x = torch.randn(int(ends[-1]), K).bfloat16().requires_grad_()
        y = compiled(x, packed, ends)
        assert torch.equal(y, packed_experts(x, packed, ends))
        y.float().sum().backward()
        assert x.grad.count_nonzero() == x.grad.numel()
    assert len(graphs) == 1


BAD = [
    (dict(x=torch.zeros(2, 69).bfloat16()), "x: expected \\[S, 70\\], got \\[2, 69\\]"),
    (dict(x=torch.zeros(1, 2, 70).bfloat16()), "x: expected \\[S, 70\\], got \\[1, 2, 70\\]"),
    (dict(x=torch.zeros(2, 70).half()), "x: expected torch.bfloat16, float32 or float64"),
    (dict(x=torch.zeros(2, 70, device="meta").bfloat16()), "x: expected it on cpu"),
    (dict(ends=[1, 1, 2, 2]), "ends: expected a torch.Tensor"),
    (dict(ends=torch.zeros(4)), "ends: expected int64 or int32 \\[E\\], got torch.float32 \\[4\\]"),
    (
        dict(ends=torch.zeros(3, dtype=torch.int64)),
        "ends: expected one for each expert of 20 packed rows, got 3",
    ),
    (
        dict(ends=torch.tensor([0, 2, 1, 2])),
        "ends: expected numbers from 0 to 2 that never fall, got 1 after 2",
    ),
    (
        dict(ends=torch.tensor([0, 0, 0, 3])),
        "ends: expected numbers from 0 to 2 that never fall, got 3 after 0",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    _, packed = experts()
    given = {"x": torch.zeros(2, 70).bfloat16(), "packed": packed, "ends": torch.tensor([0, 1, 1, 2])}
    with pytest.raises(ValueError, match=message):
        packed_experts(**(given | change))
