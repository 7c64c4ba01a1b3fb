"""Every operator on DTensors of two ranks gives what it gives on one process, gradients too, and cuts what it can."""

import pytest
import torch

import gaugekit as gk
from gaugekit.ops import sharding
from two_ranks import on_two_ranks

B, H, G, T, V = 3, 4, 2, 7, 8


def placed(mesh, placement, x):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.detach(), mesh, [placement]).requires_grad_(x.requires_grad)


def agree(function, tensors: dict, cuts: dict, out) -> None:
    """function(**tensors) on one process and cut by ``cuts`` {argument: dim, or None for whole}; what ``cuts`` does not
    name stays a plain tensor. ``out`` is the placement that has to come out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    expected = function(**tensors)
    differentiable = [name for name, x in tensors.items() if x.requires_grad]
    slope = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = []
    if differentiable:
        gradients = torch.autograd.grad(expected, [tensors[name] for name in differentiable], slope)
    given = dict(tensors)
    for name, dim in cuts.items():
        given[name] = placed(mesh, Replicate() if dim is None else Shard(dim), tensors[name])
    result = function(**given)
    assert isinstance(result, DTensor) and result.placements == (out,), result.placements
    assert result.shape == expected.shape
    torch.testing.assert_close(result.full_tensor(), expected, rtol=1e-12, atol=1e-12)
    cut = []
    if differentiable:
        cut = torch.autograd.grad(result, [given[name] for name in differentiable], placed(mesh, out, slope))
    for name, gradient, reference in zip(differentiable, cut, gradients, strict=True):
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(
            whole, reference, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def attention_operands():
    shapes = {"q": (B, H, T, V), "k": (B, G, T, V), "v": (B, G, T, V), "v0": (B, G, T, V)}
    tensors = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    for gain in ("alpha", "beta", "gamma", "lam"):
        tensors[gain] = torch.randn(H, dtype=torch.float64, requires_grad=True)
    tensors["key_lengths"] = torch.tensor([7, 5, 6])
    return tensors


BATCH = {"q": 0, "k": 0, "v": 0, "v0": 0}
HEADS = {"q": 1, "k": 1, "v": 1, "v0": 1}
GAINS = {"alpha": 0, "beta": 0, "gamma": 0, "lam": 0}


def shaped(**given):
    return gk.shaped_attention(**given, causal=True)


def attends(_):
    from torch.distributed.tensor import Shard

    tensors = attention_operands()
    agree(
        shaped, tensors, BATCH, Shard(0)
    )  # three sequences on two ranks; gains and lengths are plain tensors
    agree(shaped, tensors, HEADS | GAINS, Shard(1))
    agree(shaped, tensors, HEADS | dict.fromkeys(GAINS), Shard(1))  # whole gains are cut beside the heads
    combine = {name: x for name, x in tensors.items() if name not in ("q", "k")} | {"a": tensors["q"]}
    cuts = {name: dim for name, dim in HEADS.items() if name in combine} | {"a": 1}
    agree(lambda **x: gk.ops.shaped_combine.shaped_combine(**x, causal=True), combine, cuts, Shard(1))


def fused(**x):
    """The operator that holds both parts, whose rules torch applies: nothing is made local before it."""
    terms = [x[name] for name in ("q", "k", "v", "alpha", "beta", "gamma", "v0", "lam")]
    return torch.ops.gaugekit.shaped_attention(*terms, True, None, None, x["key_lengths"], None, 0.3)[0]


def combined(**x):
    terms = [x[name] for name in ("a", "v", "alpha", "beta", "gamma", "v0", "lam")]
    return torch.ops.gaugekit.shaped_combine(*terms, True, None, None, x["key_lengths"], None)


def operators_of_attention(_):
    from torch.distributed.tensor import Shard

    sharding.register()
    tensors = attention_operands()
    whole = dict.fromkeys(GAINS)
    agree(fused, tensors, BATCH | whole | {"key_lengths": 0}, Shard(0))
    agree(fused, tensors, HEADS | whole | {"key_lengths": None}, Shard(1))
    combine = {name: x for name, x in tensors.items() if name not in ("q", "k")} | {"a": tensors["q"]}
    rows = {"a": 1, "v": 1, "v0": 1}
    agree(combined, combine, rows | GAINS | {"key_lengths": None}, Shard(1))
    agree(combined, combine, dict.fromkeys(rows, 0) | whole | {"key_lengths": 0}, Shard(0))


def attends_with_a_rank_that_has_no_sequence(_):
    """Whose gradients are zeros, and not None, for which the other would wait."""
    from torch.distributed.tensor import Shard

    tensors = {name: attention_operands()[name][:1].detach().requires_grad_() for name in "qkv"}
    agree(shaped, tensors, dict.fromkeys("qkv", 0), Shard(0))


def decodes_from_one_cache(_):
    from torch.distributed.tensor import Replicate, Shard

    sharding.register()
    tensors = {"q": torch.randn(B, H, 2, V, dtype=torch.float64, requires_grad=True),
               "cache": torch.randn(B, G, T, V, dtype=torch.float64, requires_grad=True),
               "alpha": torch.randn(H, dtype=torch.float64, requires_grad=True),
               "key_lengths": torch.tensor([7, 5, 6])}  # fmt: skip
    one = tensors | {"cache": torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)}
    table = torch.tensor([[4, 0, 1, 7], [3, 5, 6, 6], [2, 8, 9, 6]], dtype=torch.int32)
    pages = tensors | {"cache": torch.randn(10, G, 2, V, dtype=torch.float64, requires_grad=True)}
    pages["block_table"] = table
    for slices in (False, True):

        def attend(slices=slices, **x):
            return gk.single_cache_attention(**x, slices=slices, scale=0.3, gamma=[0.1, 0.2, 0.3, 0.4])

        agree(attend, tensors, {"q": 0, "cache": 0}, Shard(0))
        agree(attend, tensors, {"q": 1, "cache": 1, "alpha": 0}, Shard(1))
        agree(attend, pages, {"q": 0}, Shard(0))
        agree(attend, pages, {"cache": 1}, Shard(1))
        agree(attend, one, {"q": 1, "cache": None}, Replicate() if slices else Shard(1))
        agree(attend, one, {"cache": 0}, Shard(0))

    def operator(q, cache, alpha, key_lengths):
        with torch.no_grad():
            gains = (alpha, None, None, None, None, None, True, None, None)
            y = torch.ops.gaugekit.single_cache_attention(q, cache, False, *gains, key_lengths, None, 0.3)
        return y

    frozen = {name: x.detach() for name, x in tensors.items()}
    agree(operator, frozen, {"q": 1, "cache": 1, "alpha": 0, "key_lengths": None}, Shard(1))
    agree(operator, frozen, {"q": 0, "cache": 0, "alpha": None, "key_lengths": 0}, Shard(0))


def attends_with_ranks_of_their_own(_):
    from torch.distributed.tensor import Replicate, Shard

    ranks = [3, 5]
    tensors = {
        "q": torch.randn(4, T, 16, dtype=torch.float64, requires_grad=True),
        "k": torch.randn(4, T, 8, dtype=torch.float64, requires_grad=True),
        "v": torch.randn(4, G, T, V, dtype=torch.float64, requires_grad=True),
    }

    def ragged(**x):
        return gk.ragged_attention(**x, ranks=ranks, scale=0.3, causal=True)

    def operator(**x):
        return torch.ops.gaugekit.ragged_attention(*x.values(), ranks, True, None, None, None, None, 0.3)[0]

    agree(ragged, tensors, dict.fromkeys(tensors, 0), Shard(0))
    agree(ragged, tensors, {"q": None, "k": None, "v": 1}, Replicate())
    agree(operator, tensors, dict.fromkeys(tensors, 0), Shard(0))


def measures_energy(_):
    from torch.distributed.tensor import Shard

    tensors = {n: torch.randn(B, h, T, V, dtype=torch.float64, requires_grad=True)
               for n, h in (("u", G), ("q", H), ("k", G), ("target", G))}  # fmt: skip
    tensors["lam"] = torch.rand((), dtype=torch.float64, requires_grad=True)
    for kernel in ("softmax", "symmetric"):

        def energy(kernel=kernel, **x):
            return gk.nonlocal_energy(**x, kernel=kernel, key_lengths=[7, 5, 6])

        rows = [name for name in tensors if name != "lam"]
        agree(energy, tensors, dict.fromkeys(rows, 0), Shard(0))
        agree(energy, tensors, dict.fromkeys(rows, 1), Shard(1))


def projects(_):
    from torch.distributed.tensor import Replicate, Shard

    heads, width, inputs = 4, 3, 10
    rows = torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()
    tensors = {
        "x": torch.randn(4, 6, inputs, dtype=torch.float64, requires_grad=True),
        "free": torch.randn(heads, inputs - width, width, dtype=torch.float64, requires_grad=True),
        "bias": torch.randn(heads * width, dtype=torch.float64, requires_grad=True),
        "rows": rows,
    }
    of_heads = {"x": None, "free": 0, "bias": 0, "rows": 0}
    agree(gk.gauge_linear, tensors, of_heads, Shard(2))
    agree(gk.gauge_linear, tensors, {"x": 0}, Shard(0))
    agree(gk.gauge_linear, tensors, {"x": 1}, Shard(1))

    def operator(**x):
        return torch.ops.gaugekit.gauge_linear(x["x"], x["free"], x["rows"], x["bias"], None, None)

    agree(operator, tensors, of_heads, Shard(2))
    agree(operator, tensors, dict.fromkeys(of_heads) | {"x": 0}, Shard(0))
    beside = tensors | {"weight": torch.randn(6, inputs, dtype=torch.float64, requires_grad=True)}
    agree(
        gk.gauge_linear, beside, {"x": None, "free": 0}, Replicate()
    )  # whole: the outputs would not lie side by side


def multiplies_packed(_):
    from torch.distributed.tensor import Shard

    packed = gk.pack_weight(torch.randn(24, 64).bfloat16())
    tensors = {"x": torch.randn(B, T, 64, dtype=torch.float64, requires_grad=True),
               "bias": torch.randn(24, dtype=torch.float64, requires_grad=True)}  # fmt: skip
    agree(lambda **x: gk.packed_linear(packed=packed, **x), tensors, {"x": 0}, Shard(0))
    parts = dict(zip(packed._fields[:5], packed[:5], strict=True))

    def operator(**x):
        return torch.ops.gaugekit.packed_linear(*x.values(), False)

    given = {"x": tensors["x"], **parts, "bias": tensors["bias"]}
    agree(operator, given, dict.fromkeys(given) | {"x": 1}, Shard(1))


def cut_both_ways(_):
    """Sequences on one dim of a mesh, heads on the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = {name: x for name, x in attention_operands().items() if name != "key_lengths"}
    expected = shaped(**tensors)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, list(tensors.values()), slope)
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape)
        given = dict(tensors)
        for name in HEADS:
            given[name] = distribute_tensor(
                tensors[name].detach(), mesh, [Shard(0), Shard(1)]
            ).requires_grad_()
        result = shaped(**given)
        assert result.placements == (Shard(0), Shard(1)) and result.shape == expected.shape
        torch.testing.assert_close(result.full_tensor(), expected, rtol=1e-12, atol=1e-12)
        cut = torch.autograd.grad(result.full_tensor(), list(given.values()), slope)
        for gradient, reference in zip(cut, gradients, strict=True):
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(whole, reference, rtol=1e-12, atol=1e-12)


def compiles_in_one_graph(_):
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh, tensors = init_device_mesh("cpu", (2,)), attention_operands()
    q, k, v = (placed(mesh, Shard(1), tensors[name][:2]) for name in "qkv")

    def call(q, k, v):
        return gk.shaped_attention(q, k, v, gamma=[0.1, 0.2, 0.3, 0.4], causal=True)

    counter = CompileCounterWithBackend("aot_eager")
    result = torch.compile(call, fullgraph=True, backend=counter)(q, k, v)
    assert counter.frame_count == 1 and result.placements == (Shard(1),)
    torch.testing.assert_close(result.full_tensor(), call(q, k, v).full_tensor())


def refuses_uneven_heads(_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    q, v = (placed(mesh, Shard(1), torch.randn(1, 3, 4, 8)) for _ in range(2))
    with pytest.raises(ValueError, match="k: expected heads that 2 ranks share evenly, got 3 of them"):
        gk.shaped_attention(q, v, v)


CHECKS = (attends, operators_of_attention, attends_with_a_rank_that_has_no_sequence, decodes_from_one_cache,
          attends_with_ranks_of_their_own, measures_energy, projects, multiplies_packed, cut_both_ways,
          compiles_in_one_graph, refuses_uneven_heads)  # fmt: skip


@pytest.mark.slow
def test_every_operator_on_two_ranks(tmp_path):
    on_two_ranks(CHECKS, tmp_path)


def test_every_differentiable_operator_has_rules():
    """Whatever has a backward, and that too."""
    defined = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gaugekit::")
    }
    backward = {name for name in defined if name.endswith("_backward")}
    assert len(backward) >= 6
    assert (
        backward | {name.removesuffix("_backward") for name in backward} <= sharding._rules.keys() <= defined
    )
