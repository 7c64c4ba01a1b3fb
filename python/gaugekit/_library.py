"""The one torch Library of gaugekit, and the loader of its binaries.

An operator's schema is written once, in ``ops/<stem>/operator.py``, by ``define``; the composition of torch operators
given there answers on every device. A binary (``_cpu.abi3.so``, ``_cuda.abi3.so``) registers faster
implementations under the same names; each may be missing without anything breaking.
``GAUGEKIT_REQUIRE=cpu,cuda,triton,codec`` turns a missing one into an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from gaugekit import _build
from gaugekit._build import Backend
from gaugekit.coder import binary

NAMESPACE = "gaugekit"
library = torch.library.Library(NAMESPACE, "DEF")

if hasattr(os, "register_at_fork"):
    # Torch's threads stay with the parent, and its operators wait for them for ever in a forked child: there it has one
    # thread, as in the workers of its own DataLoader. Our own threads begin anew (csrc/common/turns.h).
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


_backends: dict[str, Backend] = {}
_registered: set[tuple[str, str]] = set()


def define(schema: str, composition: Callable, fake: Callable) -> None:
    """Defines ``gaugekit::<name>`` from ``schema`` with its composition (any device) and its fake (shapes only)."""
    name = library.define(schema)
    library.impl(name, outside_autocast(composition), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def outside_autocast(implementation: Callable) -> Callable:
    """In the dtypes it is given, as the binaries compute: whoever calls an operator has chosen them by then."""

    @functools.wraps(implementation)
    def call(*args):
        device = next((x.device.type for x in args if isinstance(x, torch.Tensor)), "meta")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return implementation(*args)
        with torch.autocast(device, enabled=False):
            return implementation(*args)

    return call


def implementation(name: str, key: str = "CPU") -> bool:
    """Whether a binary registered a kernel for ``gaugekit::<name>`` under dispatch key ``key``."""
    if (name, key) in _registered:
        return True
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    if found:
        _registered.add((name, key))  # for good; and torch takes some microseconds to say so
    return found


def backends() -> dict[str, Backend]:
    """What stands behind the operators here, the two binaries and ``triton`` (looked up, not imported), and behind
    packed files: ``codec``.
    """
    found = dict(_backends)
    try:
        triton = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        triton = False
    found["triton"] = Backend(
        "triton", triton, "" if triton else "triton is not installed", "pip install gaugekit[triton]"
    )
    found["codec"] = binary.backend()
    return found


def load() -> None:
    """Loads the binaries beside this file; called once, when ``gaugekit.ops`` is imported."""
    for name in ("cpu", "cuda"):
        _backends[name] = _load_one(name)
    for name in _build.required():
        if not (backend := backends()[name]).loaded:
            _build.refuse(backend)
    for name, language in (("cpu", "C++"), ("cuda", "CUDA")):
        backend = _backends[name]
        if backend.loaded or (name == "cuda" and not (torch.version.cuda and _gpu_is_here())):
            continue
        _build.warn(backend, language, stacklevel=4)


def _gpu_is_here() -> bool:
    """Whether the system shows an NVIDIA GPU, asked without CUDA: who has asked CUDA cannot fork and use it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _load_one(name: str) -> Backend:
    if name == "cuda" and torch.version.cuda is None:
        return Backend(name, False, "this torch has no CUDA", "install a CUDA build of torch")
    if (missing := _build.missing(name)) is not None:
        return missing
    path = _build.place(name)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        why = f"{path.name} does not load beside torch {torch.__version__}: {_build.reasons(error)}"
        return Backend(name, False, why, _build.REBUILD, error)
    return Backend(name, True)
