"""nonlocal_energy against the equation in float64: every kernel, gradient, mask and dtype; and what it is for."""

import itertools
import subprocess
import sys

import pytest
import torch

import gaugekit as gk
from gaugekit.ops.nonlocal_energy import rows as energy_rows
from gaugekit.reference.nonlocal_energy import nonlocal_energy as reference
from helpers import assert_accurate

MASKS = {
    "every token": {},
    "causal": {"causal": True},
    "ragged": {"key_lengths": torch.tensor([7, 9])},
    "causal, ragged, one empty": {"causal": True, "key_lengths": torch.tensor([0, 5])},
}
KINDS = list(itertools.product(("softmax", "symmetric"), ("full", "row")))


def make(dtype=torch.float64, tokens=9, width=3, of_heads=False, spread=1.0, gradient=True):
    u, target = (torch.randn(2, 4 if of_heads else 2, 1, width) + spread * torch.randn(
        2, 4 if of_heads else 2, tokens, width) for _ in range(2))  # fmt: skip
    q, k = torch.randn(2, 4, tokens, 5), torch.randn(2, 2, tokens, 5)
    return [x.to(dtype).requires_grad_(gradient) for x in (u, q, k, target, torch.rand(4))]


def both(function, operands, weight, **options):
    u, q, k, target, lam = operands
    energy = function(u, q, k, target=target, lam=lam, **options)
    return [energy, *torch.autograd.grad((energy * weight).sum(), operands)]


@pytest.mark.parametrize("of_heads", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("kernel", "gradient"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_energy_and_gradients_match_the_equation(dtype, kernel, gradient, mask, of_heads):
    operands, weight = make(dtype, of_heads=of_heads), torch.randn(2, 4, dtype=dtype)
    options = {"kernel": kernel, "gradient": gradient, **MASKS[mask]}
    found, naive = (both(f, operands, weight, **options) for f in (gk.nonlocal_energy, reference))
    doubles = [x.detach().double().requires_grad_() for x in operands]
    exact = both(reference, doubles, weight.double(), **options)
    for x, y, z in zip(found, exact, naive, strict=True):
        assert x.dtype == dtype
        assert_accurate(x.detach(), y.detach(), z.detach(), ulps=16)
    if dtype == torch.float64:
        assert all((x - y).abs().max() <= 1e-12 for x, y in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["softmax", "symmetric"])
def test_half_precision_input_is_summed_in_float32(dtype, kernel):
    u, q, k, *_ = make(dtype, tokens=40, gradient=False)
    found = gk.nonlocal_energy(u, q, k, kernel=kernel, causal=True)
    assert found.dtype == torch.float32
    exact, naive = (reference(*(x.to(kind) for x in (u, q, k)), kernel=kernel, causal=True)
                    for kind in (torch.float64, torch.float32))  # fmt: skip
    # the kernel with the log-sum-exp takes centred tokens in their own dtype
    assert_accurate(
        found, exact, naive, ulps=16 if kernel == "softmax" else 2 * int(torch.finfo(dtype).eps * 2**23)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "symmetric"])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_tokens_nearly_alike(spread, kernel, causal):
    """Where the tokens differ by 1e-4 of what they share, ‖u_i‖² + ‖u_j‖² − 2 u_i·u_j holds nothing in float32."""
    u = torch.randn(1, 3, 1, 32) + spread * torch.randn(1, 3, 300, 32)
    q, k = torch.randn(2, 1, 3, 300, 16)
    exact = reference(u.double(), q.double(), k.double(), kernel=kernel, causal=causal)
    found = gk.nonlocal_energy(u, q, k, kernel=kernel, causal=causal)
    assert ((found - exact) / exact).abs().max() <= 1e-6


def test_float64_gradients_match_the_closed_form():
    """∂J/∂u = u + diag(Aᵀ1) u − A u − Aᵀ u, and ∂J/∂A_ij = ½ ‖u_i − u_j‖² through the softmax."""
    u, q, k = (torch.randn(1, 2, 30, width, dtype=torch.float64, requires_grad=True) for width in (6, 4, 4))
    found = torch.autograd.grad(gk.nonlocal_energy(u, q, k, scale=0.7).sum(), (u, q, k))
    with torch.no_grad():
        a = (0.7 * q @ k.mT).softmax(-1)
        du = u + a.sum(2)[..., None] * u - a @ u - a.mT @ u
        da = torch.cdist(u, u).square() / 2
        ds = 0.7 * a * (da - (a * da).sum(-1, keepdim=True))
    for x, y in zip(found, (du, ds @ k, ds.mT @ q), strict=True):
        assert (x - y).abs().max() <= 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_a_step_along_the_row_gradient_is_neutreno(lam):
    """u − ∂/∂u = A u + λ(v0 − u): the attention of the paper, and of shaped_attention."""
    q, k, v, v0 = (torch.randn(2, 4, 11, 6, dtype=torch.float64) for _ in range(4))
    v.requires_grad_()
    energy = gk.nonlocal_energy(v, q, k, target=v0, lam=lam, causal=True, gradient="row")
    step = v - torch.autograd.grad(energy.sum(), v)[0]
    gains = torch.full((4,), lam, dtype=torch.float64)
    expected = gk.shaped_attention(q, k, v, v0=v0, lam=gains, causal=True)
    assert_accurate(step.detach(), expected.detach(), expected.detach(), ulps=32)


def test_a_step_with_the_symmetric_kernel_is_attention_by_it():
    """With Δt_i = 1/Σ_j (K_ij + K_ji) the full gradient's step is attention with K + Kᵀ, K = exp(q kᵀ)."""
    q, k, u = (torch.randn(1, 1, 12, 5, dtype=torch.float64) for _ in range(3))
    u.requires_grad_()
    gradient = torch.autograd.grad(gk.nonlocal_energy(u, q, k, scale=0.5, kernel="symmetric").sum(), u)[0]
    e = (0.5 * q @ k.mT).exp()
    both_ways, mass = e + e.mT, e.sum() / 12
    expected = both_ways @ u.detach() / both_ways.sum(-1, keepdim=True)
    step = u.detach() - gradient / (both_ways.sum(-1, keepdim=True) / mass)
    assert_accurate(step, expected, expected, ulps=32)


def test_numbers_by_hand():
    """Two tokens at 0 and 2, uniform attention: ½ (¼·0 + …): each row has half of 4, J = ½ (2 + 2) = 2."""
    u, q = torch.tensor([0.0, 2.0]).view(1, 1, 2, 1), torch.zeros(1, 1, 2, 3)
    for f in (gk.nonlocal_energy, reference):
        assert f(u, q, q).item() == 2 and f(u, q, q, kernel="symmetric").item() == 2
        assert f(u, q, q, causal=True).item() == 1  # the first token sees itself alone
        assert f(u, q, q, target=u + 1, lam=0.5).item() == 2 + 0.25 * 2


def test_blocks_of_queries_change_nothing(monkeypatch):
    operands, weight = make(torch.float64), torch.randn(2, 4, dtype=torch.float64)
    options = {"kernel": "symmetric", **MASKS["causal, ragged, one empty"]}
    whole = both(gk.nonlocal_energy, operands, weight, **options)
    monkeypatch.setattr(energy_rows, "BLOCK", 4)
    for x, y in zip(both(gk.nonlocal_energy, operands, weight, **options), whole, strict=True):
        assert_accurate(x.detach(), y.detach(), y.detach(), ulps=32)


def test_padding_is_not_read():
    """Rows beyond the lengths may hold anything finite."""
    u, q, k, target, _ = make(torch.float32, gradient=False)
    options = {"lam": 0.5, "key_lengths": torch.tensor([3, 9])}
    before = gk.nonlocal_energy(u, q, k, target=target, **options)
    for x in (u, q, k, target):
        x[0, :, 3:] = 1e6
    assert torch.equal(gk.nonlocal_energy(u, q, k, target=target, **options), before)


def test_memory_grows_with_the_number_of_tokens():
    """8,192 tokens: one array of all their pairs would take 268 MB, and those of 4 heads 1.1 GB."""
    code = (
        "import resource, torch, gaugekit as gk;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "before = peak();"
        "gk.nonlocal_energy(*(torch.randn(1, 4, 8192, 8) for _ in range(3)), causal=True);"
        "u, q, k = (torch.randn(1, 1, 8192, 64).requires_grad_() for _ in range(3));"
        "gk.nonlocal_energy(u, q, k, causal=True).sum().backward();"
        "assert u.grad.isfinite().all();"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2.5e8
