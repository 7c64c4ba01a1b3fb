"""``gaugekit::nonlocal_energy``: the energy of every row and its log-sum-exp in one operator; on CUDA a Triton kernel.

For centred u with s_i = ‖u_i‖² and A = softmax(scale·q kᵀ): e_i = ½ s_i + ½ (A s)_i − u_i·o_i, o = A u. The function
``nonlocal_energy`` sums the rows; it uses this where the symmetric kernel needs the log-sum-exp, or on a GPU. Elsewhere
than on CUDA the composition below answers, in blocks of 256 queries with the softmax written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.shaped_combine.cuda import INSTALLED, fits, per_group, per_head
from gaugekit.ops.shaped_combine.operator import rows_like

BLOCK = 256
WIDEST = 128  # wider heads leave the backward kernels too few registers; torch's attention takes them


def kernel_takes(*tensors: Tensor) -> bool:
    """Whether the Triton kernels answer for these operands."""
    return INSTALLED and tensors[0].device.type == "cuda" and _fits(*tensors)


def _fits(*tensors: Tensor) -> bool:
    return fits(*tensors) and all(x.shape[3] <= WIDEST for x in tensors)


def of(
    u: Tensor, q: Tensor, k: Tensor, causal: bool, key_lengths: Tensor | None, scale: float, row: bool
) -> tuple[Tensor, Tensor]:
    """(energies, log-sum-exps) of the rows, both [B, H, T] and differentiable; ``row``: u_j is held constant."""
    return torch.ops.gaugekit.nonlocal_energy(u, q, k, causal, key_lengths, scale, row)[:2]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_head(x: Tensor, heads: int) -> Tensor:
    x = x.to(_wide(x))
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _blocks(q: Tensor, k: Tensor, causal: bool, key_lengths: Tensor | None, scale: float):
    """(rows, scores [B, H, block, T'], T'), −∞ where no token is seen; T' is T or, when causal, what can be."""
    tokens = q.shape[2]
    j = torch.arange(tokens, device=q.device)
    real = None if key_lengths is None else j < key_lengths[:, None]
    for begin in range(0, tokens, BLOCK):
        rows = slice(begin, min(begin + BLOCK, tokens))
        seen = rows.stop if causal else tokens
        scores = q[:, :, rows] @ k[:, :, :seen].mT * scale
        if causal:
            scores = scores.masked_fill(j[:seen] > j[rows, None], float("-inf"))
        if real is not None:
            pair = real[:, None, rows, None] & real[:, None, None, :seen]
            scores = scores.masked_fill(~pair, float("-inf"))
        yield rows, scores, seen


def composition(
    u: Tensor, q: Tensor, k: Tensor, causal: bool, key_lengths: Tensor | None, scale: float, row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    energies, log, out = _fake(u, q, k)
    u, q, k = (_per_head(x, q.shape[1]) for x in (u, q, k))
    square = u.square().sum(-1)
    for rows, scores, seen in _blocks(q, k, causal, key_lengths, scale):
        top = scores.logsumexp(-1)
        p = (scores - top.masked_fill(top.isinf(), 0)[..., None]).exp()
        o = p @ u[:, :, :seen]
        spread = (p @ square[:, :, :seen, None])[..., 0]
        energy = (square[:, :, rows] + spread) / 2 - (u[:, :, rows] * o).sum(-1)
        energies[:, :, rows] = energy.masked_fill(top.isinf(), 0)
        log[:, :, rows], out[:, :, rows] = top, o.to(out.dtype)
    return energies, log, out


def composition_backward(
    grad: Tensor,
    grad_log: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    energies: Tensor,
    log: Tensor,
    out: Tensor,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    row: bool,
) -> tuple[Tensor, ...]:
    like = (u, q, k)
    u, q, k = (_per_head(x, q.shape[1]) for x in like)
    square, delta = u.square().sum(-1), share_of_rows(grad, grad_log, u, energies)
    dq, dk, pulled = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(u)
    weight = torch.zeros_like(square)
    for rows, scores, seen in _blocks(q, k, causal, key_lengths, scale):
        top, g = log[:, :, rows, None], grad[:, :, rows, None]
        p = (scores - top.masked_fill(top.isinf(), 0)).exp()
        near = square[:, :, None, :seen] / 2 - u[:, :, rows] @ u[:, :, :seen].mT
        ds = p * (g * near - delta[:, :, rows, None]) * scale
        dq[:, :, rows] = ds @ k[:, :, :seen]
        dk[:, :, :seen] += ds.mT @ q[:, :, rows]
        weight[:, :, :seen] += (p * g).sum(2)
        pulled[:, :, :seen] += p.mT @ (g * u[:, :, rows])
    du = grad.masked_fill(log.isinf(), 0)[..., None] * (u - out.to(u.dtype))
    if not row:
        du = du + weight[..., None] * u - pulled
    return tuple(per_group(_laid(x, y), y) for x, y in zip((du, dq, dk), like, strict=True))


@_library.outside_autocast
def _triton(u, q, k, causal, key_lengths, scale, row) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(u, q, k):
        return composition(u, q, k, causal, key_lengths, scale, row)
    from gaugekit.triton_kernels.nonlocal_energy import nonlocal_energy

    outputs = _fake(u, q, k)
    nonlocal_energy(u, q, k, u.float().square().sum(-1), causal, key_lengths, scale, *outputs)
    return outputs


@_library.outside_autocast
def _triton_backward(grad, grad_log, u, q, k, energies, log, out, causal, key_lengths, scale, row):
    if not _fits(u, q, k):
        operands = (grad, grad_log, u, q, k, energies, log, out)
        return composition_backward(*operands, causal, key_lengths, scale, row)
    from gaugekit.triton_kernels.nonlocal_energy import nonlocal_energy_backward

    du, dq, dk = (per_head(x, q.shape[1]) for x in (u, q, k))
    delta = share_of_rows(grad, grad_log, u, energies).contiguous()
    operands = (grad.contiguous(), delta, u, q, k, u.float().square().sum(-1), log, out)
    nonlocal_energy_backward(*operands, causal, key_lengths, scale, row, du, dq, dk)
    return per_group(du, u), dq, per_group(dk, k)


def share_of_rows(grad: Tensor, grad_log: Tensor, u: Tensor, energies: Tensor) -> Tensor:
    """Σ_j A_ij ∂J/∂A_ij − ∂J/∂log_i: what the softmax takes off each row's gradient."""
    square = _per_head(u.to(energies.dtype).square().sum(-1, keepdim=True), grad.shape[1])[..., 0]
    return grad * (energies - square / 2) - grad_log


def _laid(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient if gradient.shape != x.shape else rows_like(x).copy_(gradient)


def _fake(u, q, k, *rest):
    rows = q.shape[:3]
    return (*(q.new_empty(rows, dtype=_wide(q)) for _ in range(2)), u.new_empty(*rows, u.shape[3]))


def _fake_backward(grad, grad_log, u, q, k, *rest):
    return rows_like(u), rows_like(q), rows_like(k)


def _save(ctx, inputs, output):
    *tensors, ctx.causal, key_lengths, ctx.scale, ctx.row = inputs
    ctx.save_for_backward(*tensors, *output, key_lengths)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad, grad_log, _):
    *tensors, key_lengths = ctx.saved_tensors
    rest = (ctx.causal, key_lengths, ctx.scale, ctx.row)
    return *torch.ops.gaugekit.nonlocal_energy_backward(grad, grad_log, *tensors, *rest), *[None] * 4


_library.define(
    "nonlocal_energy(Tensor u, Tensor q, Tensor k, bool causal, Tensor? key_lengths, float scale, bool row)"
    " -> (Tensor, Tensor, Tensor)",
    composition,
    _fake,
)
_library.define(
    "nonlocal_energy_backward(Tensor grad, Tensor grad_log, Tensor u, Tensor q, Tensor k, Tensor energies, Tensor log,"
    " Tensor out, bool causal, Tensor? key_lengths, float scale, bool row) -> (Tensor, Tensor, Tensor)",
    composition_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "gaugekit::nonlocal_energy", _backward, setup_context=_save, lib=_library.library
)
if INSTALLED:
    _library.library.impl("nonlocal_energy", _triton, "CUDA")
    _library.library.impl("nonlocal_energy_backward", _triton_backward, "CUDA")
