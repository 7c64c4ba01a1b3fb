"""Numbers and lists where an operator wants tensors; what is neither is refused by name, and so is a half of a pair."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.ops.shaped_combine import shaped_combine

Q, K, V = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
GAINS = {"alpha": 0.5, "beta": 0.75, "gamma": 0.1, "lam": 0.3}


def gain(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((4,), value, dtype=dtype)


def ragged(q, k, v, **options):
    rows = (x.transpose(1, 2).flatten(2) for x in (q, k))
    return gk.ragged_attention(*rows, v, [8, 8], scale=8**-0.5, **options)


def combined(q, k, v, **options):
    return shaped_combine(q, v, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("call", [gk.shaped_attention, ragged, combined])
def test_numbers_and_lists_are_the_tensors_they_stand_for(call, dtype):
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    own = torch.float64 if dtype == torch.float64 else torch.float32  # 0.1 is another number in float32
    rest = {"v0": v + 1, "causal": True}
    expected = call(q, k, v, **{name: gain(value, own) for name, value in GAINS.items()}, **rest,
                    key_lengths=torch.tensor([5, 3]), query_start=torch.tensor([0, -2]))  # fmt: skip
    lists = {name: [value] * 4 for name, value in GAINS.items()}
    for given in (GAINS, lists):
        assert torch.equal(call(q, k, v, **given, **rest, key_lengths=[5, 3], query_start=[0, -2]), expected)


def test_a_list_packs_sequences():
    q, k, v = (x[:1] for x in (Q, K, V))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    expected = gk.shaped_attention(q, k, v, causal=True, cu_seqlens=bounds)
    assert torch.equal(gk.shaped_attention(q, k, v, causal=True, cu_seqlens=[0, 2, 5]), expected)


def test_a_list_of_lam_in_the_energy():
    expected = gk.nonlocal_energy(Q, Q, Q, target=Q + 1, lam=gain(0.3, torch.float64))
    for lam in (0.3, [0.3] * 4):
        assert torch.equal(gk.nonlocal_energy(Q, Q, Q, target=Q + 1, lam=lam, key_lengths=[5, 5]), expected)


@pytest.mark.parametrize("call", [
    lambda q: gk.shaped_attention(q, q, q, alpha=1.0, beta=[0.5] * 4, v0=q, lam=1, causal=True, key_lengths=[3, 4]),
    lambda q: gk.nonlocal_energy(q, q, q, target=q, lam=[0.5] * 4, key_lengths=[3, 4]),
])  # fmt: skip
def test_numbers_and_lists_compile_into_one_graph(call):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(Q), call(Q), rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["q", "k", "v", "v0"])
def test_an_array_or_a_list_is_no_operand(name):
    operands = {"q": Q, "k": K, "v": V, "v0": V, "lam": 0.1}
    with pytest.raises(
        ValueError, match=f"{name}: expected a torch.Tensor, got a NumPy array: torch.from_numpy"
    ):
        gk.shaped_attention(**{**operands, name: operands[name].numpy()})
    with pytest.raises(ValueError, match=f"{name}: expected a torch.Tensor, got a list"):
        gk.shaped_attention(**{**operands, name: [1.0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": np.ones(4)}, "alpha: expected a number, .* got a NumPy array: torch.from_numpy"),
        ({"alpha": "1"}, "alpha: expected a number, .* got a str"),
        ({"alpha": True}, "alpha: expected a number, .* got a bool"),
        ({"alpha": [1.0, None, 1.0, 1.0]}, "alpha: expected a number"),
        ({"alpha": [1.0]}, r"alpha: expected \[H\] = \[4\]"),
        ({"key_lengths": np.array([1, 2])}, "key_lengths: expected a list of integers .* torch.from_numpy"),
        ({"key_lengths": [1.5, 2]}, "key_lengths: expected a list of integers"),
        ({"key_lengths": [1]}, r"key_lengths: expected int64 of shape \[B\] = \[2\]"),
        ({"lam": 0.5}, "v0: expected beside lam, got None"),
        ({"v0": V}, "lam: expected beside v0, got None"),
    ],
)
@pytest.mark.parametrize("call", [gk.shaped_attention, ragged, combined])
def test_what_is_no_gain_and_no_length_is_refused(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(Q, K, V, causal=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": Q}, "lam: expected beside target, got None"),
        ({"lam": 0.0}, "target: expected beside lam, got None"),
        ({"target": Q.numpy(), "lam": 1.0}, "target: expected a torch.Tensor, got a NumPy array"),
        ({"target": Q, "lam": np.float32(1)}, "lam: expected a number"),
    ],
)
def test_a_target_and_its_lam_come_together(options, message):
    with pytest.raises(ValueError, match=message):
        gk.nonlocal_energy(Q, Q, Q, **options)


def test_modules_take_lists_and_refuse_positions_that_nothing_uses():
    x = torch.randn(2, 5, 16)
    turned = gk.nn.ShapedAttention(16, 2, rotary_base=10_000.0)
    expected = turned(x, lengths=torch.tensor([5, 3]), positions=torch.arange(5) + 7)
    assert torch.equal(turned(x, lengths=[5, 3], positions=[7, 8, 9, 10, 11]), expected)
    for module in (gk.nn.ShapedAttention(16, 2), gk.nn.NeutrenoAttention(16, 2, lam=[0.5, 0.25])):
        with pytest.raises(ValueError, match="positions: expected None without rotary_base"):
            module(x, positions=[0, 1, 2, 3, 4])
        with pytest.raises(
            ValueError, match="x: expected a torch.Tensor, got a NumPy array: torch.from_numpy"
        ):
            module(x.numpy())


@pytest.mark.parametrize("call", [
    lambda x: gk.pack_weight(x),
    lambda x: gk.packed_linear(x, gk.pack_weight(torch.ones(4, 4).bfloat16())),
    lambda x: gk.codec.encode(x),
    lambda x: gk.nonlocal_energy(x, x, x),
])  # fmt: skip
def test_an_array_is_refused_wherever_a_tensor_is_wanted(call):
    with pytest.raises(ValueError, match=r"got a NumPy array: torch\.from_numpy\(array\) makes it a tensor"):
        call(np.ones((4, 4), np.float32))
