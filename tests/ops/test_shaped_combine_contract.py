"""shaped_combine as an operator: registration, compile, layouts, memory it must not touch, repetition, bad input."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gaugekit import _library
from gaugekit.ops.shaped_combine import shaped_combine
from gaugekit.reference.shaped_combine import shaped_combine as reference
from helpers import assert_accurate

OPERATORS = torch.ops.gaugekit
LENGTHS, START = torch.tensor([3, 7]), torch.tensor([-1, 2])


def operands(dtype=torch.float64, queries=7, keys=7, batch=2, gain_dtype=None, gradient=False):
    shapes = {
        "a": (batch, 4, queries, 5),
        "v": (batch, 2, keys, 5),
        "alpha": (4,),
        "beta": (4,),
        "gamma": (4,),
        "v0": (batch, 2, queries, 5),
        "lam": (4,),
    }
    return {
        name: torch.randn(
            shape, dtype=(gain_dtype or dtype) if len(shape) == 1 else dtype, requires_grad=gradient
        )
        for name, shape in shapes.items()
    }


def layouts(x, kind):
    """The same values in other strides."""
    if kind == "heads inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "width strided":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "inside a larger array":
        wide = torch.full([*x.shape[:3], x.shape[3] + 6], torch.nan, dtype=x.dtype)
        wide[..., 3:-3] = x
        return wide[..., 3:-3]
    if kind == "expanded":
        return x[:1].expand(x.shape)
    return x


KINDS = ["plain", "heads inside", "width strided", "inside a larger array", "expanded"]
CALLS = {
    "causal": (operands(), (True, None, None, None, None)),
    "no mask": (operands(), (False, None, None, None, None)),
    "window, start and lengths": (operands(), (True, 3, START, LENGTHS, None)),
    "packed": (operands(batch=1), (True, None, None, None, torch.tensor([0, 3, 3, 7], dtype=torch.int32))),
    "queries unlike keys": (operands(queries=3), (True, None, None, None, None)),
    "no queries": (operands(queries=0), (True, None, None, None, None)),
    "no keys": (operands(keys=0), (True, None, None, None, None)),
    "no batch": (operands(batch=0), (True, None, None, None, None)),
    "float32 gains": (operands(torch.bfloat16, gain_dtype=torch.float32), (True, None, None, None, None)),
    "bfloat16": (operands(torch.bfloat16), (True, None, None, None, None)),
    "float16": (operands(torch.float16), (True, None, None, None, None)),
    "float32": (operands(torch.float32), (False, 2, None, LENGTHS, None)),
}


def without(given, *names):
    return [None if name in names else x for name, x in given.items()]


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    given, mask = CALLS[call]
    wanted = [x.clone().requires_grad_() for x in given.values()]
    torch.library.opcheck(OPERATORS.shaped_combine.default, (*wanted, *mask))
    eager = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.shaped_combine_.default, (*given.values(), *mask), test_utils=eager)
    weight = torch.randn_like(given["a"])
    arguments = (weight, *given.values(), *mask)
    torch.library.opcheck(OPERATORS.shaped_combine_backward.default, arguments, test_utils=eager)


@pytest.mark.parametrize(
    "absent", [("v0", "lam"), ("alpha", "beta", "gamma", "v0", "lam"), ("alpha", "gamma")]
)
def test_opcheck_absent_arguments(absent):
    given, mask = CALLS["causal"]
    call = without(given, *absent)
    eager = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS.shaped_combine.default, (*call, *mask), test_utils=eager)
    found = OPERATORS.shaped_combine_backward(torch.randn_like(given["a"]), *call, *mask)
    for name, x, gradient in zip(given, call, found, strict=True):
        assert gradient.shape == (given[name].shape if x is not None else (0,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides(kind, dtype):
    plain = operands(dtype)
    given = {name: layouts(x, kind) if x.dim() == 4 else x for name, x in plain.items()}
    mask = (True, None, None, LENGTHS, None)
    eager = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.shaped_combine.default, (*given.values(), *mask), test_utils=eager)
    weight = layouts(torch.randn_like(plain["a"]), kind)
    backward = OPERATORS.shaped_combine_backward
    torch.library.opcheck(backward.default, (weight, *given.values(), *mask), test_utils=eager)
    same = {name: x.contiguous() for name, x in given.items()}
    out = shaped_combine(**given, causal=True, key_lengths=LENGTHS)
    assert torch.equal(out, shaped_combine(**same, causal=True, key_lengths=LENGTHS))
    found = backward(weight, *given.values(), *mask)
    expected = backward(weight.contiguous(), *same.values(), *mask)
    for x, y in zip(found, expected, strict=True):
        if _library.implementation("shaped_combine_backward"):
            assert torch.equal(x, y)
        else:  # the composition's sums follow the layout
            assert_accurate(x, y.double(), y)


@pytest.mark.parametrize("call", ["causal", "no mask", "window, start and lengths", "packed"])
def test_gradcheck(call):
    given, (causal, window, start, lengths, packed) = CALLS[call]
    names, values = list(given), [x.clone().requires_grad_() for x in given.values()]

    def function(*tensors):
        return shaped_combine(
            **dict(zip(names, tensors, strict=True)),
            causal=causal, window=window, query_start=start, key_lengths=lengths, cu_seqlens=packed,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, values, fast_mode=False)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_fullgraph_compile(lengths):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(shaped_combine, backend=counter, fullgraph=True)
    given = operands(torch.float32, gradient=True)
    out = compiled(**given, causal=True, key_lengths=lengths)
    eager = shaped_combine(**given, causal=True, key_lengths=lengths)
    assert counter.frame_count == 1
    assert torch.equal(out, eager)
    weight = torch.randn_like(out)
    found, expected = (torch.autograd.grad(x, given.values(), weight) for x in (out, eager))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(not _library.implementation("shaped_combine"), reason="no C++ binary")
def test_nothing_around_a_view_is_touched():
    """The in-place form writes its rows and nothing beside them, in every dtype and for widths with a tail."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for width in (1, 5, 16, 33):
            surroundings = torch.full((2, 4, 9, width + 8), 7.0, dtype=dtype)
            a = surroundings[:, :, 1:-1, 4:-4]
            a.copy_(torch.randn(a.shape))
            v, gain = torch.randn(2, 2, 7, width, dtype=dtype), torch.randn(4)
            expected = shaped_combine(a.clone(), v, alpha=gain, beta=gain, gamma=gain, causal=True)
            OPERATORS.shaped_combine_(a, v, gain, gain, gain, None, None, True, None, None, None, None)
            assert torch.equal(a, expected)
            surroundings[:, :, 1:-1, 4:-4] = 7.0
            assert torch.equal(surroundings, torch.full_like(surroundings, 7.0))


def test_result_is_new_memory():
    given = operands()
    out = shaped_combine(given["a"], given["v"])
    assert torch.equal(out, given["a"]) and out.data_ptr() != given["a"].data_ptr()


def test_padding_rows_ignore_what_the_core_left_there():
    given = operands(torch.float32)
    given["a"][0, :, 3:] = torch.nan
    out = shaped_combine(**given, causal=True, key_lengths=LENGTHS)
    clean = {**given, "a": given["a"].nan_to_num(0.0)}
    ref = reference(**{k: x.double() for k, x in clean.items()}, causal=True, key_lengths=LENGTHS)
    assert_accurate(out, ref, reference(**clean, causal=True, key_lengths=LENGTHS))


BAD = {
    "window": {"window": 0},
    "query_start": {"query_start": torch.tensor([1, 2], dtype=torch.int32)},
    "key_lengths": {"key_lengths": torch.tensor([1, 8])},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
    "alpha": {"alpha": torch.ones(3)},
    "beta": {"beta": torch.ones(4, dtype=torch.bfloat16)},
    "gamma": {"gamma": torch.ones(4, 1)},
    "lam": {"lam": None},
    "v0": {"v0": None},
    "v0:": {"v0": torch.ones(2, 2, 6, 5, dtype=torch.float64)},
    "v": {"v": torch.ones(2, 3, 7, 5, dtype=torch.float64)},
    "v:": {"v": torch.ones(2, 2, 7, 5)},
    "a": {"v": torch.ones(2, 2, 7, 6, dtype=torch.float64), "v0": None, "lam": None},
    "dtype": {"a": torch.ones(2, 4, 7, 5, dtype=torch.int64)},
    "alpha, lam": {"causal": False, "v": torch.ones(2, 2, 8, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    with pytest.raises(ValueError, match=f"^{name.rstrip(':')}: expected .* got "):
        shaped_combine(**{**operands(), "causal": True, **BAD[name]})


@pytest.mark.parametrize("bounds", [[0, 5, 3, 7], [1, 7], [0, 6]])
def test_bad_packing(bounds):
    packed = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="^cu_seqlens: expected values rising from 0 to T = 7, got "):
        shaped_combine(**operands(batch=1), cu_seqlens=packed)


@pytest.mark.skipif(not _library.implementation("shaped_combine"), reason="no C++ binary")
def test_direct_calls_cannot_read_outside_memory():
    given = operands()
    tail = (None, None, None, None, None)
    for bad in ({"v": given["v"][:, :, :, :3]}, {"alpha": torch.ones(2)}, {"v0": given["v0"][:, :, :2]}):
        with pytest.raises(RuntimeError, match="expected"):
            OPERATORS.shaped_combine(*{**given, **bad}.values(), True, *tail[1:])
    packed = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
        OPERATORS.shaped_combine(*operands(batch=1).values(), True, None, None, None, packed)
