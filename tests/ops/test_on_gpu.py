"""Every operator with a CUDA or Triton backend on a GPU: output and gradients beside float64, in three dtypes."""

import pytest
import torch

import gaugekit as gk
from gaugekit.ops.packed_linear import pack_weight, packed_experts, packed_linear, unpack_weight
from gaugekit.ops.shaped_attention import use_core
from gaugekit.reference.gauge_linear import gauge_linear as gauge_reference
from gaugekit.reference.nonlocal_energy import nonlocal_energy as energy_reference
from gaugekit.reference.ragged_attention import ragged_attention as ragged_reference
from gaugekit.reference.shaped_attention import shaped_attention as attention_reference
from gaugekit.reference.shaped_combine import shaped_combine as combine_reference
from gaugekit.reference.single_cache_attention import single_cache_attention as cache_reference
from helpers import assert_accurate

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LENGTHS = pytest.mark.parametrize("length", [3, 67, 200])
RANKS = [5, 8, 24]
MASK = (None, None, True, None, None, None, None)  # no v0, no lam; causal
DEVICES = [
    0,
    pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")),
]


def strided(length, width, dtype, heads=3):
    """[1, H, T, V] as a view of [1, T, H·V + 8]: rows are not dense, and heads lie side by side."""
    rows = (torch.randn(2, length, heads * width + 8) / 2 + 0.25).to(dtype)
    return rows[..., : heads * width].unflatten(2, (heads, width)).transpose(1, 2)


def on(x, device):
    """The same view on the device: a copy keeps no gaps between rows."""
    rows = x.transpose(1, 2).flatten(2)
    wide = torch.zeros(*rows.shape[:2], rows.shape[2] + 8, dtype=x.dtype, device=device)
    wide[..., : rows.shape[2]] = rows
    return wide[..., : rows.shape[2]].unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


def assert_both_ways(ours, reference, operands, device):
    """Output and gradients of ``ours`` on the device, law 4 beside the reference in float64 and in the dtype."""
    here = [(on(x, device) if x.dim() == 4 else x.to(device)).requires_grad_() for x in operands]
    found = ours(*here)
    weight = torch.randn(found.shape)
    results = [[found, *torch.autograd.grad(found, here, weight.to(found))]]
    for dtype in (torch.float64, operands[0].dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        out = reference(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, weight.to(found.dtype).to(out))])
    for mine, exact, naive in zip(*results, strict=True):
        assert mine.device == torch.device(device)
        assert_accurate(mine.detach().cpu(), exact.detach(), naive.detach())


@DTYPES
@LENGTHS
@pytest.mark.parametrize("core", ["fused", "torch", "flex"])
def test_shaped_attention(dtype, length, core):
    """shaped_attention and shaped_attention_backward, and the two other cores, heads strided."""

    def ours(q, k, v):
        with use_core(core):
            return gk.shaped_attention(q, k, v, alpha=gains, beta=gains, gamma=gains, causal=True)

    gains = torch.tensor([0.5, 1.0, 2.0], device="cuda")
    host = dict.fromkeys(("alpha", "beta", "gamma"), gains.cpu())
    operands = [strided(length, width, dtype) for width in (16, 16, 40)]
    assert_both_ways(
        ours, lambda q, k, v: attention_reference(q, k, v, **host, causal=True), operands, "cuda:0"
    )


@DTYPES
@LENGTHS
def test_shaped_combine(dtype, length):
    """shaped_combine and shaped_combine_backward; shaped_combine_ writes over A the same numbers."""
    gains = torch.tensor([0.5, 1.0, 2.0], device="cuda")
    operands = [strided(length, 40, dtype) for _ in range(2)]
    host = dict.fromkeys(("alpha", "beta", "gamma"), gains.cpu())
    assert_both_ways(
        lambda a, v: torch.ops.gaugekit.shaped_combine(a, v, gains, gains, gains, *MASK),
        lambda a, v: combine_reference(a, v, **host, causal=True),
        operands,
        "cuda:0",
    )
    a, v = (on(x, "cuda") for x in operands)
    out = torch.ops.gaugekit.shaped_combine(a, v, gains, gains, gains, *MASK)
    torch.ops.gaugekit.shaped_combine_(a, v, gains, gains, gains, *MASK)
    assert torch.equal(a, out)


@DTYPES
@LENGTHS
def test_ragged_attention(dtype, length):
    """ragged_attention and ragged_attention_backward, heads of three ranks, the operands' rows apart."""
    q, k = ((torch.randn(2, length, sum(RANKS)) / 2).to(dtype) for _ in range(2))
    operands = [q, k, strided(length, 40, dtype)]
    options = {"scale": 0.25, "causal": True}
    assert_both_ways(
        lambda q, k, v: gk.ragged_attention(q, k, v, RANKS, **options),
        lambda q, k, v: ragged_reference(q, k, v, RANKS, **options),
        operands,
        "cuda:0",
    )


@DTYPES
@LENGTHS
def test_nonlocal_energy(dtype, length):
    """nonlocal_energy and nonlocal_energy_backward, u, q and k strided."""
    operands = [strided(length, width, dtype) for width in (24, 16, 16)]

    def plain(u, q, k):
        """The equation, in the dtype; its mean taken out of u, as the differences of u allow."""
        return energy_reference(u - u.detach().mean(2, keepdim=True), q, k)

    assert_both_ways(gk.nonlocal_energy, plain, operands, "cuda:0")


@DTYPES
@LENGTHS
def test_gauge_linear(dtype, length):
    """gauge_linear and gauge_linear_backward, with a plain projection before the heads and a bias."""
    rows = torch.stack([torch.randperm(96)[:24] for _ in range(3)]).int()
    shapes = [(2, length, 96), (3, 72, 24), (72,), (40, 96), (40,)]
    operands = [(torch.randn(shape) / 10).to(dtype) for shape in shapes]
    assert_both_ways(
        lambda x, free, *rest: gk.gauge_linear(x, free, rows.cuda(), *rest),
        lambda x, free, *rest: gauge_reference(x, free, rows, *rest),
        operands,
        "cuda:0",
    )


@DTYPES
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("slices", [True, False])
def test_single_cache_attention(dtype, queries, slices):
    """single_cache_attention over several splits: terms and slices of rows, or turned keys; the cache strided."""
    lengths = torch.tensor([1300, 700])
    q, cache = torch.randn(2, 6, queries, 96).to(dtype), strided(1300, 96, dtype, heads=1 if slices else 2)
    options = {"scale": 0.1, "slices": slices, "key_lengths": lengths}
    if slices:
        options |= {name: torch.randn(6) for name in ("alpha", "beta", "gamma")}
    else:
        angle = torch.randn(1300, 12)
        options |= {"cos": angle.cos(), "sin": angle.sin(), "key_gain": torch.randn(96)}
    here = {name: x.cuda() if torch.is_tensor(x) else x for name, x in options.items()}
    out = gk.single_cache_attention(q.cuda(), on(cache, "cuda"), **here)
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    exact = cache_reference(q.double(), cache.double(), **wide)
    assert_accurate(out.cpu(), exact, cache_reference(q, cache, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 70, 300])
def test_packed_linear(dtype, rows, device):
    """packed_linear for every way it takes, at odd shapes, x strided, and the gradient of x."""
    weight = (torch.randn(67, 200) * 0.02).to(dtype)
    packed = pack_weight(weight.to(f"cuda:{device}"))
    assert torch.equal(unpack_weight(packed).cpu().view(torch.int16), weight.view(torch.int16))
    x = torch.randn(rows, 208).to(dtype)
    here = x.to(f"cuda:{device}")[:, :200].requires_grad_()
    out = packed_linear(here, packed)
    grad = torch.randn(rows, 67).to(dtype)
    (dx,) = torch.autograd.grad(out, here, grad.to(out.device))
    x = x[:, :200]
    assert_accurate(out.detach().cpu(), x.double() @ weight.double().T, x @ weight.T)
    assert_accurate(dx.cpu(), grad.double() @ weight.double(), grad @ weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_experts(dtype, device):
    """Each group of rows by its own expert, of several, of none and of many rows, and the gradient of x."""
    weight = (torch.randn(3, 67, 200) * 0.02).to(dtype)
    packed = pack_weight(weight.flatten(0, 1).to(f"cuda:{device}"))
    x, grad, ends = torch.randn(310, 200).to(dtype), torch.randn(310, 67).to(dtype), torch.tensor([5, 5, 305])
    here = x.to(f"cuda:{device}").requires_grad_()
    out = packed_experts(here, packed, ends.to(here.device))
    (dx,) = torch.autograd.grad(out, here, grad.to(out.device))
    assert not out[305:].any() and not dx[305:].any()
    for expert, rows in ((0, slice(0, 5)), (2, slice(5, 305))):
        own = weight[expert]
        assert_accurate(out[rows].detach().cpu(), x[rows].double() @ own.double().T, x[rows] @ own.T)
        assert_accurate(dx[rows].cpu(), grad[rows].double() @ own.double(), grad[rows] @ own)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_runs_on_the_device_of_its_operands(device):
    """Whatever device is current."""
    operands = [strided(70, 16, torch.float32) for _ in range(3)]

    def ours(q, k, v):
        with use_core("fused"):
            return gk.shaped_attention(q, k, v, causal=True)

    assert_both_ways(
        ours, lambda q, k, v: attention_reference(q, k, v, causal=True), operands, f"cuda:{device}"
    )
