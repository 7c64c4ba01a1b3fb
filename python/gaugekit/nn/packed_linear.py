"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gaugekit.nn.packed_layer import PackedMatrixLayer
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.operands import autocast_dtype
from gaugekit.ops.packed_linear.operator import packed_linear


class PackedLinear(PackedMatrixLayer):
    """y = x Wᵀ + b, W frozen in the lossless layout of docs/resident.md: x [..., inputs] -> [..., outputs].

    x may be of W's dtype, float32 or float64, and of float16 or bfloat16 where W is float8_e5m2 (unscaled: the numbers
    as they are; the bias then is of torch's default dtype unless ``dtype`` says another); under autocast y has
    autocast's dtype, as nn.Linear's has, while W is multiplied as it is. ``weight`` is a PackedMatrix, the bias a plain
    parameter. ``matrix`` is a PackedMatrix to share (a tied embedding's); without it one is made, its weights still to
    be loaded. Gradients flow to x and the bias.
    """

    form = "packed_linear"

    def __init__(self, inputs: int, outputs: int, bias: bool = True, weights: str = "bfloat16",
                 matrix: PackedMatrix | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(matrix, outputs, inputs, weights, device)
        self.in_features, self.out_features = inputs, outputs
        kind = dtype or (torch.get_default_dtype() if weights == "float8_e5m2" else getattr(torch, weights))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=kind)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PackedLinear:
        """The packed twin of ``linear``, which is left as it is. ValueError unless its weight is bf16, fp16 or
        float8_e5m2."""
        return cls.from_parts(PackedMatrix.of(linear.weight), linear.bias)

    @classmethod
    def from_parts(cls, matrix: PackedMatrix, bias: Tensor | None = None) -> PackedLinear:
        """A layer around ``matrix``, which it shares, and a copy of ``bias``."""
        outputs, inputs = matrix.value.shape
        layer = cls(inputs, outputs, False, str(matrix.dtype).split(".")[1], matrix)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain linear layer with copies of the weight, bit for bit, and of the bias."""
        weight = self._outputs_first().detach().clone(memory_format=torch.contiguous_format)
        layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return layer

    def _outputs_first(self) -> Tensor:
        return self.weight if self.__dict__.get("stands_for", nn.Linear) is nn.Linear else self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.weight, PackedMatrix):
            return linear(x, self._outputs_first(), self.bias)
        weight, kind = self.weight.value, autocast_dtype(x)
        if kind is not None:
            x = x.to(kind)
            if kind not in weight.operands:  # float16 weights under bfloat16, or the other way round
                x = x.float()
        y = packed_linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return y if kind is None else y.to(kind)
