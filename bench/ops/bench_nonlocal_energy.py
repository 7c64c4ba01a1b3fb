"""The nonlocal energy beside what it is made of and what it replaces: plain attention and the T×T equation.

``without_us`` on the CPU is the energy as a user of torch writes it, with the T×T array; plain attention at the same
shape does less than the energy and bounds it. Compiled, the T×T array is still there.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention as attention

import gaugekit as gk
from gaugekit.reference.nonlocal_energy import nonlocal_energy as reference
from registry import Case, benchmark, own_shape

EAGER = "eager, T×T"
PLAIN = "plain attention"


def eager(u, q, k):
    """The equation for a whole softmax matrix: ½ Σ_i (s_i + (A s)_i) − Σ_i u_i·(A u)_i, s = ‖u‖²."""
    a = torch.softmax(q @ k.mT * q.shape[3] ** -0.5, -1)
    square = u.float().square().sum(-1, keepdim=True)
    spread = a.to(square.dtype) @ square
    return ((square + spread).sum((2, 3)) / 2 - (u * (a @ u)).float().sum((2, 3))).float()


def forward(function, operands):
    def call():
        with torch.no_grad():
            return function(*operands)

    return call


def both_ways(function, operands):
    def call():
        out = function(*operands)
        return torch.autograd.grad(out, operands, torch.ones_like(out))

    return call


def check(operands, found):
    def call():
        few = [x.detach()[:, :2, :256] for x in operands]
        exact = reference(*(x.double() for x in few))
        error = ((gk.nonlocal_energy(*few) - exact) / exact).abs().max()
        bound = 1e-6 if few[0].dtype == torch.float32 else 1e-2
        assert error <= bound, f"relative error {error:.1e}"
        assert all(x.isfinite().all() for x in found())

    return call


def energies(batch, heads, tokens, width, dtype, device, threads=None):
    """Forward and both ways."""
    operands = [
        torch.randn(batch, tokens, heads, width, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    u, q, k = operands
    products = 2 * batch * heads * tokens**2 * width
    for name, way, count in (("forward", forward, 2), ("forward+backward", both_ways, 7)):
        yield Case(
            op="nonlocal_energy",
            shape=f"B{batch} T{tokens} H{heads} K{width} {name}",
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            threads=threads,
            ours=way(gk.nonlocal_energy, operands),
            rivals={PLAIN: way(attention, [q, k, u]), EAGER: way(eager, operands)},
            without_us=EAGER,
            check=check(operands, way(gk.nonlocal_energy, operands)),
            flops=count * products,
        )


@own_shape("nonlocal_energy", "BATCHxTOKENSxHEADSxWIDTH", "1x2048x12x64", torch.float32, torch.bfloat16)
def own(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, threads: int):
    if tokens < 2:  # whose energy is zero
        raise ValueError(f"--shape: expected TOKENS of 2 or more, got {tokens}")
    yield from energies(batch, heads, tokens, width, dtype, "cpu", threads)


@benchmark("nonlocal_energy")
def cases(device: str, quick: bool):
    batch, heads, tokens, width = (1, 12, 256, 64) if quick else (1, 12, 2048, 64)
    yield from energies(batch, heads, tokens, width, torch.float32, device)
    if not quick:
        operands = [torch.randn(1, 12, 16384, 8).requires_grad_() for _ in range(3)]
        yield Case(
            op="nonlocal_energy", shape="B1 T16384 H12 K8 forward", dtype="float32", device=device,
            ours=forward(gk.nonlocal_energy, operands), rivals={PLAIN: forward(attention, operands), EAGER: None},
            without_us=PLAIN, check=check(operands, forward(gk.nonlocal_energy, operands)),
            label=f"{EAGER} would need 12.9 GB",
        )  # fmt: skip
