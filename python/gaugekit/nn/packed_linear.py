"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.packed_linear import packed_linear
from gaugekit.ops.packed_linear_weight import unpack_weight


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, W frozen in the lossless layout of docs/packed.md: x [..., inputs] -> [..., outputs].

    x may be of W's dtype, float32 or float64; under autocast y has autocast's dtype, as nn.Linear's has, while W is
    multiplied as it is. The bias is a parameter. ``matrix`` is a PackedMatrix to share (a tied
    embedding's); without it one is made, its weights still to be loaded. Gradients flow to x and the bias.
    """

    form = "packed_linear"

    def __init__(self, inputs: int, outputs: int, bias: bool = True, weights: str = "bfloat16",
                 matrix: PackedMatrix | None = None, device=None, dtype=None):  # fmt: skip
        super().__init__()
        if weights not in ("bfloat16", "float16"):
            raise ValueError(f"weights: expected bfloat16 or float16, got {weights!r}")
        if matrix is not None and matrix.value.shape != (outputs, inputs):
            raise ValueError(f"matrix: expected [{outputs}, {inputs}], got {list(matrix.value.shape)}")
        kind = getattr(torch, weights)
        self.in_features, self.out_features = inputs, outputs
        self.packed = PackedMatrix(outputs, inputs, kind, device) if matrix is None else matrix
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype or kind)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PackedLinear:
        """The packed twin of ``linear``, which is left as it is. ValueError unless its weight is bf16 or fp16."""
        return cls.from_parts(PackedMatrix.of(linear.weight), linear.bias)

    @classmethod
    def from_parts(cls, matrix: PackedMatrix, bias: Tensor | None = None) -> PackedLinear:
        """A layer around ``matrix``, which it shares, and a copy of ``bias``."""
        outputs, inputs = matrix.value.shape
        made = cls(inputs, outputs, False, str(matrix.value.dtype).split(".")[1], matrix)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return made

    def to_linear(self) -> nn.Linear:
        """A plain linear layer with the weight bit for bit and a copy of the bias."""
        weight = self.weight
        made = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        made.weight = nn.Parameter(weight)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return made

    @property
    def weight(self) -> Tensor:
        """W, unpacked anew each time it is asked for."""
        return unpack_weight(self.packed.value)

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weight."""
        return self.packed.value.bytes

    def forward(self, x: Tensor) -> Tensor:
        weight, kind = self.packed.value, None
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            kind = torch.get_autocast_dtype(x.device.type)
            x = x.to(kind)
            if (
                kind != weight.dtype
            ):  # float16 weights under bfloat16, or the other way round: exact in float32
                x = x.float()
        y = packed_linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return y if kind is None else y.to(kind)
