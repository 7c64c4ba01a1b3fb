"""A GPU that is not there: what is put on ``cuda`` is a meta tensor, Triton's launches are noted and not compiled.

Shapes, strides, offsets and types are true, so every launch is the one a GPU would get; numbers are not. Reading one
back gives zeros, and a comparison is true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_true_device = torch._C.TensorBase.device.__get__
_beneath = 0  # > 0 inside torch's own code, where a meta tensor is one


@contextlib.contextmanager
def _inside_torch():
    global _beneath
    _beneath += 1
    try:
        yield
    finally:
        _beneath -= 1


def _device(x: torch.Tensor) -> torch.device:
    device = _true_device(x)
    return CUDA if device.type == "meta" and not _beneath else device


_kernels: dict[str, Callable] = {}  # what gaugekit registers for CUDA, by name
_implement = torch.library.Library.impl


def _remember(library, name, kernel, dispatch_key="", **options):
    """``Library.impl``, noting our kernels: torch has no call of one for a tensor that is not on its device."""
    if library.ns == "gaugekit" and dispatch_key == "CUDA":
        _kernels[f"gaugekit::{name}"] = kernel
    return _implement(library, name, kernel, dispatch_key, **options)


torch.library.Library.impl = _remember  # at import: before gaugekit registers


def _is_cuda(x) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (
        isinstance(x, str) and x.split(":")[0] == "cuda"
    )


class Names(TorchFunctionMode):
    """Whoever asks for ``cuda`` gets ``meta``; what comes back to the host is zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0].to("meta")
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.is_cuda.__get__:
            return _device(args[0]).type == "cuda"
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and any(map(_is_cuda, kwargs.values())):
            kwargs.pop("generator")
        args = tuple("meta" if _is_cuda(x) else x for x in args)
        kwargs = {name: "meta" if _is_cuda(x) else x for name, x in kwargs.items()}
        return function(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Our operators run what they registered for CUDA, torch's run on meta tensors; no number is there to be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # torch's own Python asks for the device that a tensor names, beneath whoever said it by name
        kwargs = {name: torch.device("meta") if _is_cuda(x) else x for name, x in (kwargs or {}).items()}
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(_true_device(x).type == "meta" for x in given) or str(kwargs.get("device")) == "meta"
        kernel = _kernels.get(function.name().partition(".")[0])
        if there and kernel is not None:
            with self, Names():
                return kernel(*args, **kwargs)
        if there:
            with _inside_torch():
                return self.on_meta(function, args, kwargs)
        return function(*args, **kwargs)

    def on_meta(self, function, args, kwargs):
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if function is aten.equal.default:
            return True
        if function is aten.copy_.default and _true_device(args[0]).type == "cpu":
            return args[0].zero_()
        args, kwargs = torch.utils._pytree.tree_map(_on_meta, (args, kwargs))
        to = kwargs.get("device")
        if function is aten._to_copy.default and to is not None and to.type == "cpu":
            return torch.zeros_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
        return function(*args, **kwargs)


def _on_meta(x):
    return x.to("meta") if isinstance(x, torch.Tensor) and _true_device(x).type == "cpu" and x.dim() else x


class Operand:
    """What Triton asks of a tensor: its type and where it begins. An allocation begins at a multiple of 512 bytes."""

    def __init__(self, x: torch.Tensor):
        self.dtype, self.offset = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return (1 << 20) + self.offset


def _note_launches(triton, record) -> None:
    run = triton.JITFunction.run

    def note(self, *args, grid, warmup, **kwargs):
        args = [Operand(x) if isinstance(x, torch.Tensor) else x for x in args]
        kwargs = {name: Operand(x) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def hook(*, fn, compile, **_):
        record(fn, compile["specialization_data"])
        return True  # Triton then compiles nothing and launches nothing

    triton.JITFunction.run = note
    triton.knobs.runtime.jit_cache_hook = hook


def driver(triton, arch: int):
    """What Triton asks of a GPU before it compiles."""

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())


def _properties(arch: int, shared: int) -> SimpleNamespace:
    return SimpleNamespace(
        name="recorded, not run", major=arch // 10, minor=arch % 10, multi_processor_count=132, warp_size=32,
        total_memory=80 << 30, shared_memory_per_block_optin=shared, max_threads_per_multi_processor=2048,
        L2_cache_size=50 << 20,
    )  # fmt: skip


@contextlib.contextmanager
def present(record, arch: int, shared: int):
    """From here on torch says that there is a GPU; inside, ``record(function, specialization)`` hears of each launch.

    For a process of its own: what torch says is not taken back.
    """
    import triton

    properties = _properties(arch, shared)
    driver(triton, arch)
    _note_launches(triton, record)
    torch.Tensor.device = property(_device)
    torch.Tensor.is_cuda = property(lambda x: _device(x).type == "cuda")
    torch.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    cuda = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda._lazy_init = lambda: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda._exchange_device = cuda._maybe_exchange_device = lambda _: -1
    cuda.get_device_properties, cuda.get_device_name = lambda *_: properties, lambda *_: properties.name
    cuda.get_device_capability = lambda *_: (properties.major, properties.minor)
    with Operators(), Names():
        yield
