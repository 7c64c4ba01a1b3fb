"""A projection whose gauge is fixed: it holds only what can be observed."""

from __future__ import annotations

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _get_tracing_state
from torch.nn.functional import linear

from gaugekit.nn.kept import Keeping
from gaugekit.ops.gauge_linear import choice
from gaugekit.ops.gauge_linear.layout import dense
from gaugekit.ops.gauge_linear.operator import DTYPES, differentiable, transforms


def widen(y: Tensor, heads: int, padded: int) -> Tensor:
    """y [..., heads·width] with zeros behind each head's outputs: [..., heads·padded]."""
    y = y.unflatten(-1, (heads, -1))
    return nn.functional.pad(y, (0, padded - y.shape[-1])).flatten(-2)


_FORWARD = torch.ops.gaugekit.gauge_linear_forward.default  # looked up once: every token pays for it


class GaugeProjection(Keeping):
    """y_h = x[..., P_h] + x[..., P̄_h] F_h (+ b): x [..., D] -> [..., heads·width].

    P_h, the ``rows`` [heads, width] int32, are the inputs that pass through; F_h, the parameter ``free``
    [heads, D − width, width], takes the others in ascending order. ``bias`` [heads·width] is there only on request:
    keys and values need none. With ``padded`` each head's outputs are followed by zeros up to that width (keys of lower
    rank than their queries' module expects).

    Where it was measured to be faster (``ops.gauge_linear.choice``, which knows of training by itself) a kernel of ours
    multiplies ``free`` as it lies. Elsewhere torch multiplies a dense weight: made anew at each call while gradients
    flow to ``free``, else kept in evaluation mode until ``free`` or ``rows`` changes. Writes through ``.data``, which
    PyTorch does not count, are seen after the next ``train()`` or ``eval()``.
    """

    form = "gauge_projection"

    def __init__(self, inputs: int, heads: int, width: int, bias: bool = False, padded: int | None = None,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        for name, size in (("inputs", inputs), ("heads", heads), ("width", width)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        if width > inputs:
            raise ValueError(f"width: expected at most inputs={inputs}, got {width}")
        if padded is not None and padded < width:
            raise ValueError(f"padded: expected at least width={width}, got {padded}")
        self.inputs, self.heads, self.width, self.padded = inputs, heads, width, padded
        self._settle()
        self.free = nn.Parameter(torch.zeros(heads, inputs - width, width, device=device, dtype=dtype))
        first = torch.arange(width, dtype=torch.int32, device=device).repeat(heads, 1)
        self.register_buffer("rows", first)
        self.bias = nn.Parameter(torch.zeros(heads * width, device=device, dtype=dtype)) if bias else None

    @property
    def arguments(self) -> dict:
        """What ``config.json`` keeps of this module."""
        arguments = {"inputs": self.inputs, "heads": self.heads, "width": self.width}
        arguments["bias"] = self.bias is not None
        return arguments if self.padded is None else arguments | {"padded": self.padded}

    @property
    def weight(self) -> Tensor:
        """The dense weight [heads·width, D], as nn.Linear has it (a transposed view)."""
        return dense(self.free, self.rows, self._block()).mT

    def _block(self) -> Tensor | None:
        """What stands in the ``rows`` of each head; None for the identity."""
        return None

    def _made_of(self) -> tuple[Tensor, ...]:
        """What ``weight`` is made of."""
        return self.free, self.rows

    @property
    def product(self) -> tuple[str, str]:
        """("kernel" or "dense", why): how this projection is computed where it stands, outside autocast."""
        return self._plan(self.free.dtype, self.free.device.type)

    def _plan(self, dtype: torch.dtype, device: str) -> tuple[str, str]:
        return choice.plan(choice.kind(), self.inputs, self.heads, self.width, dtype, device)

    def _settle(self) -> None:
        """Keeps for which dtypes the kernel is taken here: ``forward`` asks at every call, a compiler's trace too."""
        self._kernels = tuple(d for d in DTYPES if self._plan(d, "cpu")[0] == "kernel")
        self._trained = tuple(d for d in self._kernels if choice.trains(choice.kind(), d))

    def forward(self, x: Tensor) -> Tensor:
        free = self.free
        y = None
        if free.is_cpu and free.dtype in self._kernels:
            y = by_kernel(x, free, self.rows, self.bias, self._trained)
        if y is None:
            y = linear(x, self._dense(), self.bias)
        return y if self.padded is None else widen(y, self.heads, self.padded)

    def _dense(self) -> Tensor:
        """``weight``, in evaluation mode the one that is kept where it may be."""
        if self.training:
            return self.weight
        return self.kept(lambda: self.weight, *self._made_of())

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in super().__getstate__().items()
            if name not in ("_kernels", "_trained")
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._settle()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())


def by_kernel(
    x: Tensor, free: Tensor, rows: Tensor, bias: Tensor | None, trained: tuple[torch.dtype, ...] = ()
) -> Tensor | None:
    """y on a CPU by the operator; None where torch has to do it: under autocast and vmap, and wherever something is
    differentiated, but for the dtypes ``trained``: forward and backward together were measured not to be slower.
    """
    if is_autocast_enabled("cpu") or transforms():
        return None
    if _get_tracing_state() is not None:  # a graph for both, and without Python
        return torch.ops.gaugekit.gauge_linear(x, free, rows, bias, None, None)
    if is_grad_enabled() and (
        x.requires_grad or free.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return differentiable(x, free, rows, bias, None, None) if free.dtype in trained else None
    return _FORWARD(x, free, rows, bias, None, None)
