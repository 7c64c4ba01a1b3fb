"""The packed matrix that a layer holds, or that several share: an embedding and the head tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.ops.packed_linear_weight import PackedWeight, check, empty_weight, pack_weight


class PackedMatrix(nn.Module):
    """A frozen matrix [``rows``, ``columns``] of bfloat16 or float16 in the layout of docs/packed.md, as five buffers.

    Shared as one module, it stays shared when the model moves. Loading a state_dict takes packed tensors of any number
    of escapes and refuses, with ValueError, what does not fit together. It does not pickle: save a state_dict.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, device=None):
        super().__init__()
        self.hold(empty_weight(rows, columns, dtype, device))

    @classmethod
    def of(cls, weight: Tensor) -> PackedMatrix:
        """Packs ``weight`` [N, K] (see ``gaugekit.pack_weight``)."""
        made = cls(0, weight.shape[-1], device=weight.device)
        made.hold(pack_weight(weight))
        return made

    def hold(self, packed: PackedWeight) -> None:
        """Takes the parts of ``packed`` as its buffers."""
        self.columns = packed.columns
        for name in PackedWeight._fields[:5]:
            self.register_buffer(name, getattr(packed, name))

    @property
    def value(self) -> PackedWeight:
        return PackedWeight(self.raw, self.planes, self.escapes, self.offsets, self.window, self.columns)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest):
        names = PackedWeight._fields[:5]
        missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
        if any(prefix + name not in state_dict for name in names):
            return
        device = None if self.raw.is_meta else self.raw.device
        parts = (state_dict[prefix + name].detach() for name in names)
        made = PackedWeight(
            *(p.clone() if device is None else p.to(device, copy=True) for p in parts), self.columns
        )
        if made.raw.shape[0] != self.raw.shape[0]:
            raise ValueError(f"{prefix}raw: expected {self.raw.shape[0]} rows, got {made.raw.shape[0]}")
        check(made)
        self.hold(made)

    def __deepcopy__(self, memo):
        made = memo[id(self)] = type(self)(0, self.columns)
        made.hold(PackedWeight(*(part.clone() for part in self.value[:5]), self.columns))
        return made

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "packed weights do not pickle: save model.state_dict() (safetensors or torch.save) instead"
        )

    def extra_repr(self) -> str:
        return f"{self.raw.shape[0]}, {self.columns}, dtype={self.value.dtype}"
