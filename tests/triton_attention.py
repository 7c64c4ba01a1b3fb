"""Calls of the fused attention's launchers on a Case, and their comparison with the float64 oracle."""

from __future__ import annotations

import torch

from gaugekit.triton_kernels import shaped_attention as kernels
from gaugekit.triton_kernels.shaped_attention_backward import shaped_attention_backward
from helpers import assert_accurate
from triton_cases import DEVICE, GAINS, Case, per_group


def lengths(*values):
    return torch.tensor(values)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


def build(dtype=torch.float32, **options) -> Case:
    return Case(dtype, **{"key_width": 16} | options)


def forward(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, v0, *gains = (case.here(name) for name in ("q", "k", "v", "v0", *GAINS))
    out = torch.empty(*q.shape[:3], case.width, dtype=q.dtype, device=DEVICE)
    a, lse = torch.empty_like(out), torch.empty(q.shape[:3], device=DEVICE)
    scale = case.key_width**-0.5
    kernels.shaped_attention(q, k, v, *gains[:3], v0, gains[3], *case.mask_here(), scale, out, a, lse)
    return out, a, lse


def backward(case: Case) -> dict[str, torch.Tensor]:
    q, k, v, v0, *gains = (case.here(name) for name in ("q", "k", "v", "v0", *GAINS))
    _, a, lse = forward(case)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dv0 = None if v0 is None else torch.empty(a.shape, device=DEVICE)
    total = shaped_attention_backward(
        case.grad.to(DEVICE), q, k, v, a, lse, *gains[:3], v0, gains[3], *case.mask_here(), case.key_width**-0.5,
        dq, dk, dv, dv0,
    )  # fmt: skip
    found = {"dq": dq, "dk": dk, "dv": dv}
    if dv0 is not None:
        found["dv0"] = per_group(dv0, case.groups).to(case.dtype)
    return found | {f"d{name}": total[i].float() for i, name in enumerate(GAINS) if name[0] in case.gains}


def check(case: Case) -> None:
    exact, naive = case.reference(torch.float64), case.reference(case.dtype)
    assert_accurate(forward(case)[0].cpu(), exact["out"], naive["out"])
    gradients = {name: x.cpu() for name, x in backward(case).items()}
    for name, found in gradients.items():
        if name[1:] in GAINS:
            case.assert_gain_accurate(name[1:], found, exact[name], naive[name])
    # One scale for all: where a query sees one key alone, dq and dk are differences that vanish.
    names = [name for name in ("dq", "dk", "dv", "dv0") if name in gradients]
    assert_accurate(
        *(torch.cat([kind[name].flatten() for name in names]) for kind in (gradients, exact, naive))
    )
