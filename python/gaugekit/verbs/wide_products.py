"""16-bit matrix products by way of float32, where the processor has none of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}


class _WideProducts(TorchDispatchMode):
    """Computes each product of ``dtype`` on the CPU in float32 and rounds it once."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator not in _PRODUCTS or any(x.dtype != self.dtype or x.device.type != "cpu" for x in args):
            return operator(*args, **kwargs)
        return operator(*(x.float() for x in args), **kwargs).to(self.dtype)


def wide_products(dtype: torch.dtype) -> AbstractContextManager:
    """A context in which this thread's matrix products of ``dtype`` run in float32 and are rounded to it once.

    That is what a processor with 16-bit products does: their terms are summed in float32. Where torch has none for
    this processor, it multiplies elements one by one, at a fourth of the speed or less. Nothing changes for other
    dtypes, other devices, and on processors that have them; no gradient may be wanted.
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(
        dtype
    )
    native = name is None or getattr(torch.ops.mkldnn, name, lambda: True)()
    return nullcontext() if native else _WideProducts(dtype)
