"""The nonlocal energy of a model's attentions as a term of its loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gaugekit.nn.tap import Tap
from gaugekit.ops.nonlocal_energy.operator import nonlocal_energy


class NonlocalRegularizer(nn.Module):
    """weight · mean over layers, sequences and heads of J/n, J = ½ Σ_ij A_ij ‖v_i − v_j‖² of an attention's n values.

    It hangs hooks on ``model`` and on the ``Tap`` of each attention in it (of those in ``layers`` alone: indices in the
    order of ``model.modules()``). A call of the model collects, and then::

        loss = criterion(model(x), y) + regularizer()

    A negative ``weight`` rewards spread: over-smoothed tokens have no energy. ``relative``: J/Σ‖v_i‖² instead, which
    scaling the values does not change; it is 0 where all tokens agree. What a backward pass recomputes is not collected
    (gradient checkpointing), and each call of the model starts anew (gradient accumulation: call this once a batch).
    Energies are float32 under autocast. Under DistributedDataParallel or FSDP give it the model that is wrapped.
    Attention windows are not covered. ``remove()`` takes the hooks off.

    ``energies`` is the last call's: {layer: [B, H]}. ValueError for layers that are not there, where there is no Tap
    (a transformers model: fuse it first), and for a call without a forward pass before it.
    """

    def __init__(self, model: nn.Module, *, layers: Iterable[int] | None = None, weight: float = 1.0,
                 relative: bool = False, kernel: str = "softmax", gradient: str = "full"):  # fmt: skip
        super().__init__()
        taps = [module for module in model.modules() if isinstance(module, Tap)]
        wanted = range(len(taps)) if layers is None else list(layers)
        if not taps or any(not 0 <= layer < len(taps) for layer in wanted):
            raise ValueError(
                f"layers: expected numbers of the {len(taps)} attentions with a Tap, got {list(wanted)}"
            )
        self.weight, self.relative, self.count = weight, relative, len(wanted)
        self.options = {"kernel": kernel, "gradient": gradient}
        self.energies: dict[int, Tensor] = {}
        self._open = False
        self._handles = [
            taps[layer].register_forward_hook(self._hook(layer), with_kwargs=True) for layer in wanted
        ]
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def forward(self) -> Tensor:
        if not self.energies:
            raise ValueError("energies: expected a forward pass of the model before, got none")
        return self.weight * torch.stack([energy.mean() for energy in self.energies.values()]).mean()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_) -> None:
        self.energies, self._open = {}, True

    def _end(self, *_) -> None:
        self._open = False

    def _hook(self, layer: int):
        def collect(_, inputs, mask: dict, __) -> None:
            energy = self._energy(
                *inputs, **mask
            )  # in a recomputation too: it must save what the first run saved
            if self._open:
                self.energies[layer] = energy

        return collect

    def _energy(self, u, q, k, *, causal, window=None, key_lengths=None, scale=None) -> Tensor:
        if window is not None and window < q.shape[2]:
            raise ValueError(f"window: expected none, or at least the {q.shape[2]} tokens, got {window}")
        with torch.autocast(u.device.type, enabled=False):
            u, q, k = (
                x.to(torch.promote_types(u.dtype, torch.promote_types(q.dtype, k.dtype))) for x in (u, q, k)
            )
            mask = {"causal": causal, "key_lengths": key_lengths, "scale": scale}
            energy = nonlocal_energy(u, q, k, **mask, **self.options)
            real = None
            if key_lengths is not None:
                real = torch.arange(u.shape[2], device=u.device) < key_lengths[:, None]
            if not self.relative:
                return energy / (u.shape[2] if real is None else real.sum(1, keepdim=True).clamp(min=1))
            square = u.to(energy.dtype).square().sum(-1)
            size = (square if real is None else square.where(real[:, None], 0)).sum(-1)
            size = size.clamp(min=torch.finfo(size.dtype).tiny)
            return energy / size.repeat_interleave(q.shape[1] // u.shape[1], dim=1)
