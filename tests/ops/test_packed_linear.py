"""packed_linear against its oracle, its gradients, and what torch asks of an operator."""

import pytest
import torch
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit.ops import processor
from gaugekit.ops.packed_linear import choice as planning
from gaugekit.ops.packed_linear import pack_weight, packed_linear
from gaugekit.reference import packed_linear as reference
from helpers import assert_accurate

E5M2 = torch.float8_e5m2
DTYPES = [torch.bfloat16, torch.float16, E5M2]
SHAPES = [(1, 1), (3, 64), (5, 70), (9, 1030)]


def normal(n, k, dtype):
    return (torch.randn(n, k) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 16, 17, 65])
def test_product(dtype, n, k, batch):
    weight = normal(n, k, dtype)
    packed = pack_weight(weight)
    for kind in packed.operands:
        x, bias = torch.randn(batch, k).to(kind), torch.randn(n).to(kind)
        y = packed_linear(x, packed, bias)
        assert y.dtype == kind and y.is_contiguous()
        assert_accurate(y, reference.packed_linear(x, *packed[:5], bias), linear(x, weight.to(kind), bias))


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(31, 70, 65), (32, 33, 1023), (33, 100, 64), (200, 41, 4161), (257, 9, 31)]
)
def test_many_rows_on_any_number_of_threads(rows, n, k):
    """Many rows take another product where numbers are multiplied in pairs: outputs in lanes, parts of columns."""
    weight = normal(n, k, torch.bfloat16)
    packed, x, bias = pack_weight(weight), torch.randn(rows, k).bfloat16(), torch.randn(n).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(packed_linear(x, packed, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert_accurate(found[0], reference.packed_linear(x, *packed[:5], bias), linear(x, weight, bias))


def test_same_bits_for_every_batch_and_without_escapes():
    """The order of summation is one: a row of x gives the same bits alone and among sixteen, however it was packed."""
    weight, x = normal(7, 1500, torch.bfloat16), torch.randn(16, 1500).bfloat16()
    together = packed_linear(x, pack_weight(weight))
    for code_bits in (3, 4):
        packed = pack_weight(weight, code_bits=code_bits)
        assert torch.equal(packed_linear(x, packed), together)
        assert torch.equal(torch.cat([packed_linear(x[i : i + 1], packed) for i in range(16)]), together)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_every_number_of_float8_e5m2_is_multiplied_as_it_is(kind):
    """Rows of the identity pick single weights: each is the number in x's dtype, and no weight comes with a scale."""
    words = torch.arange(256).to(torch.uint8).view(4, 64).view(E5M2)
    packed = pack_weight(words)
    finite = torch.where(words.to(kind).isfinite(), words.to(kind), 0)
    for batch in (1, 2, 4, 8, 64):
        x = torch.eye(64, dtype=kind)[:batch]
        y = packed_linear(x, pack_weight(finite.to(E5M2)))
        assert torch.equal(y, finite.T[:batch])
        special = packed_linear(torch.ones(batch, 64, dtype=kind), packed)
        assert special.isfinite().tolist() == [words.float().isfinite().all(1).tolist()] * batch
        assert special[:, 1].isnan().all() and special[:, 3].isnan().all()  # of infinities and NaNs
        one = words.clone()
        one.view(torch.uint8)[1, 61:] = one.view(torch.uint8)[3, 61:] = 0  # the NaNs
        y = packed_linear(torch.ones(batch, 64, dtype=kind), pack_weight(one))
        assert (y[:, 1] == float("inf")).all() and (y[:, 3] == -float("inf")).all()


def test_float8_e5m2_takes_the_bits_of_its_numbers_in_wider_dtypes():
    """Sums are float32 in one order, so rows of float32, float16 and, without products of pairs, bfloat16 agree with
    those of float16 weights."""
    weight = normal(7, 1500, E5M2)
    packed, halves = pack_weight(weight), pack_weight(weight.half())
    for batch in (1, 3, 16):
        x = torch.randn(batch, 1500).half()
        assert torch.equal(packed_linear(x, packed), packed_linear(x, halves))
        assert torch.equal(packed_linear(x.float(), packed), packed_linear(x.float(), halves))
    wide = torch.randn(16, 1500).bfloat16()
    together = packed_linear(wide, packed)
    assert torch.equal(torch.cat([packed_linear(wide[i : i + 1], packed) for i in range(16)]), together)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_leading_axes(shape):
    weight = normal(5, 70, torch.bfloat16)
    x = torch.randn(*shape, 70).bfloat16()
    y = packed_linear(x, pack_weight(weight))
    assert y.shape == (*shape, 5)
    flat = packed_linear(x.reshape(-1, 70), pack_weight(weight))
    assert torch.equal(y.reshape(-1, 5), flat)


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0)])
def test_empty(n, k):
    packed = pack_weight(torch.zeros(n, k, dtype=torch.bfloat16))
    bias = torch.ones(n, dtype=torch.bfloat16)
    assert torch.equal(packed_linear(torch.ones(3, k).bfloat16(), packed, bias), bias.expand(3, n))


def test_special_numbers_reach_the_output():
    weight = torch.zeros(4, 70, dtype=torch.bfloat16)
    weight[0, 3], weight[1, 65], weight[2, 69] = float("inf"), float("nan"), -float("inf")
    y = packed_linear(torch.ones(1, 70).bfloat16(), pack_weight(weight))[0]
    assert y[0] == float("inf") and y[1].isnan() and y[2] == -float("inf") and y[3] == 0


def test_gradients():
    weight = normal(5, 70, torch.bfloat16)
    packed = pack_weight(weight)
    narrow = pack_weight(weight.to(E5M2))
    x = torch.randn(3, 70, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: packed_linear(x, packed, b), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: packed_linear(x, narrow, b), (x, bias))
    x16 = torch.randn(3, 70).bfloat16().requires_grad_()
    packed_linear(x16, packed).sum().backward()
    plain = x16.detach().clone().requires_grad_()
    linear(plain, weight).sum().backward()
    assert_accurate(x16.grad, weight.double().sum(0).expand(3, 70), plain.grad)


@pytest.mark.parametrize(
    ("dtype", "biased", "batch"),
    [
        (dtype, (i + j) % 2 == 0, batch)
        for i, dtype in enumerate(DTYPES)
        for j, batch in enumerate((0, 2, 20))
    ],
)  # every dtype with every batch, and each of them with a bias and without
def test_opcheck_linear(dtype, biased, batch):
    packed = pack_weight(normal(5, 70, dtype))
    dtype = packed.operands[0]
    x = torch.randn(2, batch, 70).to(dtype).requires_grad_()
    bias = torch.zeros(5, dtype=dtype, requires_grad=True) if biased else None
    torch.library.opcheck(torch.ops.gaugekit.packed_linear.default, (x, *packed[:5], bias, batch < 4))
    torch.library.opcheck(torch.ops.gaugekit.packed_linear_planned.default, (x, *packed[:5], bias))
    grad = torch.randn(2, batch, 5).to(dtype)
    torch.library.opcheck(torch.ops.gaugekit.packed_linear_backward.default, (grad, *packed[:5], 70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_layout(dtype):
    weight = normal(5, 70, dtype)
    packed = pack_weight(weight)
    for index in (None, torch.tensor([4, 0, 4]), torch.zeros(0, dtype=torch.int64)):
        torch.library.opcheck(torch.ops.gaugekit.packed_rows.default, (index, *packed))
    if dtype == E5M2:  # packed as float16
        return
    found = torch.ops.gaugekit.packed_survey(weight)
    begins = torch.nn.functional.pad(found[:, 0, 1].cumsum(0), (1, 0))
    count = packed.escapes.numel()
    torch.library.opcheck(torch.ops.gaugekit.packed_survey.default, (weight,))
    torch.library.opcheck(torch.ops.gaugekit.packed_encode.default, (weight, packed.window, begins, 3, count))


def test_compiles():
    weight = normal(5, 70, torch.bfloat16)
    packed = pack_weight(weight)
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(packed_linear, fullgraph=True, backend=backend)
    for batch in (1, 3, 40):
        x = torch.randn(batch, 70).bfloat16().requires_grad_()
        y = compiled(x, packed)
        assert torch.equal(y, packed_linear(x, packed))
        grad = torch.randn(batch, 5).bfloat16()
        (found,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(found, torch.autograd.grad(packed_linear(x, packed), x, grad)[0])
        assert found.count_nonzero() == found.numel()
    assert graphs


BAD = [
    (dict(x=torch.zeros(2, 69).bfloat16()), "x: expected \\[..., 70\\], got \\[2, 69\\]"),
    (dict(x=torch.zeros(2, 70).half()), "x: expected torch.bfloat16, float32 or float64"),
    (dict(x=torch.zeros(2, 70, device="meta").bfloat16()), "x: expected it on cpu"),
    (
        dict(packed=pack_weight(torch.zeros(5, 70).to(E5M2)), x=torch.zeros(2, 70).to(E5M2)),
        "x: expected torch.float16, torch.bfloat16, float32 or float64, got torch.float8_e5m2",
    ),
    (dict(bias=torch.zeros(4).bfloat16()), "bias: expected \\[5\\]"),
    (dict(bias=torch.zeros(5)), "bias: expected \\[5\\] of torch.bfloat16"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    packed = pack_weight(normal(5, 70, torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        packed_linear(**({"x": torch.zeros(2, 70).bfloat16(), "packed": packed, "bias": None} | change))


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(2, 3), {}, "weight: expected bfloat16, float16 or float8_e5m2, got torch.float32"),
        (
            torch.zeros(2, 3).to(torch.float8_e4m3fn),
            {},
            "got torch.float8_e4m3fn: .* 7.2 to 7.3 of their 8 bits",
        ),
        (torch.zeros(2, 0).to(E5M2), {}, "weight: expected columns in a float8_e5m2 matrix, got \\[2, 0\\]"),
        (torch.zeros(3).half(), {}, "weight: expected \\[N, K\\], got \\[3\\]"),
        (torch.zeros(2, 3).half(), {"code_bits": 5}, "code_bits: expected 3, 4 or None, got 5"),
    ],
)
def test_bad_weight(weight, options, message):
    with pytest.raises(ValueError, match=message):
        gk.pack_weight(weight, **options)


def test_plan_is_a_table_by_processor(monkeypatch):
    def plan(rows, dtype=torch.bfloat16, device="cpu"):
        return planning.plan(rows, dtype, device)

    tables = (("avx2", 16), ("avx512", 64), ("pairs", 2048), ("16-bit", 4), ("other", 16))
    for kind, most in (*tables, ("arm", 16), ("arm-bf16", 16)):
        monkeypatch.setattr(planning, "kind", lambda dtype, kind=kind: kind)
        assert plan(most) == "fused" and plan(most + 1) == "decode"
        assert plan(16, torch.float32) == "fused"
    assert plan(17, torch.float32) == plan(1, torch.float64) == "decode"
    assert plan(256, torch.float16, "cuda") == plan(256, device="cuda") == "fused"
    assert plan(257, torch.float16, "cuda") == plan(1, device="mps") == "decode"


UNMEASURED = ("16-bit", "arm", "arm-bf16", "other")


def test_the_note_on_speed_says_where_packed_products_lose(monkeypatch):
    said = {}
    for kind in planning.FUSED_ROWS:
        monkeypatch.setattr(planning, "kind", lambda dtype, kind=kind: kind)
        said[kind] = planning.speed_note()
    assert "0.82" in said["avx2"] and "Zen 3" in said["avx2"]
    assert "Zen 4" in said["pairs"] and all("not been measured" in said[kind] for kind in UNMEASURED)
    assert "not been measured" in planning.speed_note(E5M2)  # on the last one


def test_arm_is_known_by_its_name_and_its_features(monkeypatch):
    found = lambda dtype: planning.kind.__wrapped__(dtype)  # noqa: E731
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(processor, "flags", processor.flags.__wrapped__)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert [found(dtype) for dtype in (torch.bfloat16, torch.float16)] == ["arm-bf16", "arm"]
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "Features\t: fp asimd\n")
    assert found(torch.bfloat16) == "arm"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # then the binary takes its portable form
    assert found(torch.bfloat16) == "other"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E5M2])
def test_tiles_are_the_same_bits_on_any_number_of_threads_and_under_autocast(dtype, kind, biased):
    """Several tiles, the last one short, each thread taking those it comes to."""
    packed = pack_weight(normal(300, 1000, dtype))
    x = torch.randn(20, 1000).to(kind).requires_grad_()
    bias = torch.randn(300).to(kind) if biased else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.gaugekit.packed_linear(x, *packed[:5], bias, False))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.ops.gaugekit.packed_linear(x, *packed[:5], bias, False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
    assert found[0].dtype == kind and found[0].requires_grad
