"""On a GPU: the nonlocal energy beside the best a user of torch can write, torch's attention with one more column.

The column holds ‖u_i‖², so that one attention gives A u and A ‖u‖²; u is centred before. Plain attention at the same
shape does less than the energy and bounds it.
"""

import torch
from torch.nn.functional import pad

import gaugekit as gk
from gaugekit.reference.nonlocal_energy import nonlocal_energy as reference
from registry import Call, Planned, benchmark
from rivals import KERNELS, assert_close, both_ways, compiled, exactly, forward, pinned, trained

COLUMN = "torch.compile, attention with one more column, "


def energy_with_column(core):
    """½ Σ_i (s_i + (A s)_i) − Σ_i u_i·(A u)_i, s = ‖u‖²; zeros fill every width up to the same multiple of eight."""

    def energy(u, q, k):
        width = u.shape[3]
        u = u - u.mean(2, keepdim=True)
        square = u.float().square().sum(-1, keepdim=True)
        values = pad(torch.cat([u, square.to(u.dtype)], -1), (0, -(width + 1) % 8))
        queries, keys = (pad(x, (0, values.shape[3] - x.shape[3])) for x in (q, k))
        out = core(queries, keys, values, q.shape[3] ** -0.5).float()
        spread = (square[..., 0] + out[..., width]) / 2 - (u.float() * out[..., :width]).sum(-1)
        return spread.sum(-1)

    return energy


def attention(core):
    return lambda u, q, k: core(q, k, u)


def energy(batch, count, length, width, kind, way, device):
    def rows(batch=batch, count=count, length=length):
        return [
            torch.randn(batch, length, count, width, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(4)
        ]

    def check():
        few = rows(1, 2, 256)[:3]
        exact = exactly(reference, *few)
        naive = energy_with_column(pinned("flash", causal=False))(*few)
        assert_close(gk.nonlocal_energy(*few), naive, exact)
        leaves = trained(*(x.clone() for x in few))
        assert all(x.isfinite().all() for x in torch.autograd.grad(gk.nonlocal_energy(*leaves).sum(), leaves))

    def make():
        u, q, k, grad = rows()
        leaves = trained(u, q, k)
        one = torch.ones(batch, count, device=device)
        ours = (one, *leaves) if way is both_ways else leaves
        plain = (grad, *leaves) if way is both_ways else leaves
        cores = {name: pinned(name, causal=False) for name in KERNELS}
        rivals = {
            COLUMN + name: Call(way(compiled(energy_with_column(core))), ours) for name, core in cores.items()
        }
        rivals |= {
            f"plain attention, {name}": Call(way(attention(cores[name])), plain)
            for name in ("cuDNN", "flash")
        }
        return {
            "ours": Call(way(gk.nonlocal_energy), ours),
            "rivals": rivals,
            "without_us": tuple(COLUMN + name for name in cores),
            "check": check,
            "flops": (2 if way is forward else 7) * 2 * batch * count * length**2 * width,
            "goal": ("plain attention, flash", 0.9) if way is both_ways and length == 4096 else None,
        }

    shape = f"B{batch} T{length} H{count} K{width} {kind}"
    return Planned("nonlocal_energy", shape, "bfloat16", make, device=device)


@benchmark("nonlocal_energy", device="cuda")
def cases(device: str, quick: bool):
    for batch, length, width in [(1, 512, 64)] if quick else [(8, 4096, 64), (8, 4096, 128), (1, 2048, 64)]:
        for kind, way in (("forward+backward", both_ways), ("forward", forward)):
            yield energy(batch, 16, length, width, kind, way, device)
