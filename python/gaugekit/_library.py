"""The one torch Library of gaugekit, and the loader of its binaries.

An operator's schema is written once, in ``ops/<stem>/operator.py``, by ``define``; the composition of torch operators
given there answers on every device. A binary (``_cpu.abi3.so``, ``_cuda.abi3.so``) registers faster
implementations under the same names; each may be missing without anything breaking.
``GAUGEKIT_REQUIRE=cpu,cuda,triton`` turns a missing one into an error.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

NAMESPACE = "gaugekit"
FOLDER = Path(__file__).resolve().parent
library = torch.library.Library(NAMESPACE, "DEF")

if hasattr(os, "register_at_fork"):
    # Torch's threads stay with the parent, and its operators wait for them for ever in a forked child: there it has one
    # thread, as in the workers of its own DataLoader. Our own threads begin anew (csrc/common/turns.h).
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass
class Backend:
    """One way to run our operators on this machine: whether it is there, else why not and what mends it."""

    name: str
    loaded: bool
    why: str = ""
    remedy: str = ""
    error: Exception | None = field(default=None, repr=False, compare=False)  # what loading it raised


_backends: dict[str, Backend] = {}


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
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def backends() -> dict[str, Backend]:
    """What stands behind the operators here: the two binaries, and ``triton`` (looked up, not imported)."""
    found = dict(_backends)
    try:
        triton = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        triton = False
    found["triton"] = Backend(
        "triton", triton, "" if triton else "triton is not installed", "pip install gaugekit[triton]"
    )
    return found


def load() -> None:
    """Loads the binaries beside this file; called once, when the package is imported."""
    built = _build_record()
    for name in ("cpu", "cuda"):
        _backends[name] = _load_one(name, {"sources": built.get("sources"), **built.get(name, {})})
    required = [name for name in os.environ.get("GAUGEKIT_REQUIRE", "").replace(" ", "").split(",") if name]
    for name in required:
        backend = backends().get(name)
        if backend is None:
            raise ImportError(f"GAUGEKIT_REQUIRE: expected names among cpu, cuda, triton; got {name!r}")
        if not backend.loaded:
            raise ImportError(
                f"GAUGEKIT_REQUIRE asks for {name}: {backend.why}. To mend it: {backend.remedy}"
            ) from backend.error
    for name, language in (("cpu", "C++"), ("cuda", "CUDA")):
        backend = _backends[name]
        if backend.loaded or (name == "cuda" and not (torch.version.cuda and _gpu_is_here())):
            continue
        warnings.warn(
            f"gaugekit runs without its {language} binary (slower, same results): {backend.why}. "
            f"To mend it: {backend.remedy}",
            RuntimeWarning,
            stacklevel=3,
        )


def _gpu_is_here() -> bool:
    """Whether the system shows an NVIDIA GPU, asked without CUDA: who has asked CUDA cannot fork and use it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _build_record() -> dict:
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _sources_differ(built_from: str | None) -> bool:
    """Whether csrc stands in the checkout around this package and is not what the binaries were built from.

    A binary whose signatures are older than the schemas would crash, not raise.
    """
    root = FOLDER.parents[1]
    if built_from is None or not (root / "csrc").is_dir() or not (root / "setup.py").is_file():
        return False
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest() != built_from


def _load_one(name: str, built: dict) -> Backend:
    path = FOLDER / f"_{name}.abi3.so"
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps . (in gaugekit's source folder)"
    if name == "cuda" and torch.version.cuda is None:
        return Backend(name, False, "this torch has no CUDA", "install a CUDA build of torch")
    if not path.exists():
        why = built.get("why") or "it was not built when gaugekit was installed"
        return Backend(name, False, why, built.get("remedy") or rebuild)
    if _sources_differ(built.get("sources")):
        return Backend(name, False, f"{path.name} was built from other sources than those beside it", rebuild)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        why = f"{path.name} does not load beside torch {torch.__version__}: {_reasons(error)}"
        return Backend(name, False, why, rebuild, error)
    return Backend(name, True)


def _reasons(error: BaseException | None) -> str:
    """The first line of an error and of each that caused it: torch names the file, the linker below it the symbol."""
    lines = []
    while error is not None:
        lines.append((str(error).strip().splitlines() or [repr(error)])[0])
        error = error.__cause__
    return "; ".join(lines)
