"""What gaugekit finds on this machine, what it lacks, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform

import torch

from gaugekit import __version__, _library, ops
from gaugekit.report import Report, table

EXTRAS = {
    "hf": ("transformers", "safetensors", "tqdm"),
    "demo": ("transformers", "safetensors", "tqdm", "gguf", "zstandard"),
    "serving": ("transformers", "safetensors", "tqdm", "accelerate", "fastapi", "openai", "uvicorn"),
    "bench": ("transformers", "safetensors", "tqdm", "zstandard", "zipnn"),
    "triton": ("triton",),
}
CPU_FEATURES = (
    "avx2", "fma3", "f16c", "avx512_f", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16",
)  # fmt: skip


def report() -> Report:
    """Versions, CPU features, backends, operators and extras as this machine has them.

    Fields: ``gaugekit``, ``python``, ``torch``; ``cpu`` {name, architecture, cores, threads, features}; ``cuda_device``
    (name or None; asked of torch only where torch was built for CUDA); ``backends`` {cpu | cuda | triton | codec:
    {loaded, why, remedy}}; ``operators`` {name: {"cpu" | "cuda": "binary" or "composition"}}; ``extras`` {extra:
    {present, packages: {name: version or None}, remedy}}. The notes name, one line each, what could be mended and how.
    """
    backends = {
        name: {
            "loaded": b.loaded,
            "why": b.why if not b.loaded else "",
            "remedy": "" if b.loaded else b.remedy,
        }
        for name, b in _library.backends().items()
    }
    extras = {extra: _extra(extra, packages) for extra, packages in EXTRAS.items()}
    report = Report(
        "doctor",
        {
            "gaugekit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": machine(),
            "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "backends": backends,
            "operators": _operators(),
            "extras": extras,
        },
        [
            f"{name}: {b['why']}. To mend it: {b['remedy']}"
            for name, b in backends.items()
            if not b["loaded"] and b["remedy"] != "nothing to do"
        ]
        + [
            f"extra {extra}: incomplete. To mend it: {e['remedy']}"
            for extra, e in extras.items()
            if e["remedy"]
        ],
    )
    return _told(report)


def machine() -> dict:
    """The CPU a measurement was taken on: name, architecture, cores, torch threads, and the vector units it has."""
    # get_capabilities is newer than the oldest torch gaugekit takes
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "name": _cpu_name() or capabilities.get("cpu_name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in CPU_FEATURES if capabilities.get(name)],
    }


def _told(report: Report) -> Report:
    """``report`` with its text."""
    cpu, fields = report["cpu"], report.fields
    report.lines = [
        ("versions", f"gaugekit {fields['gaugekit']}, python {fields['python']}, torch {fields['torch']}"),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['vector']}"),
        ("features", ", ".join(cpu["features"]) or "not known to this torch"),
        ("cuda", fields["cuda_device"] or "no device"),
    ]
    devices = {
        name: "  ".join(f"{device}: {kind}" for device, kind in row.items())
        for name, row in fields["operators"].items()
    }
    packages = {
        extra: ", ".join(f"{name} {version or '(missing)'}" for name, version in entry["packages"].items())
        for extra, entry in fields["extras"].items()
    }
    report.tables = {
        "backends": _columns(
            {
                name: "loaded" if b["loaded"] else f"missing: {b['why']}"
                for name, b in fields["backends"].items()
            }
        ),
        "operators": _columns(devices),
        "extras": _columns(packages),
    }
    report.done = "Looked at this installation; nothing was written."
    # what anybody's machine can have; CUDA and the tools to measure with are for some
    wanted = [fields["backends"].get("cpu"), *(fields["extras"][extra] for extra in ("hf", "demo"))]
    report.next = next((entry["remedy"] for entry in wanted if entry and entry["remedy"]), "gaugekit demo")
    return report


def _columns(rows: dict[str, str]) -> list[str]:
    return [line.removeprefix("  ") for line in table(list(rows.items()))]


def _operators() -> dict[str, dict[str, str]]:
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(module.name)
    prefix = f"{_library.NAMESPACE}::"
    # overload names ("gaugekit::rans.out") are the same operator
    names = {
        name.removeprefix(prefix).split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    }
    return {
        name: {
            key.lower(): "binary" if _library.implementation(name, key) else "composition"
            for key in ("CPU", "CUDA")
        }
        for name in sorted(names)
    }


def _extra(extra: str, packages: tuple[str, ...]) -> dict:
    versions = {name: _version(name) for name in packages}
    present = all(versions.values())
    return {
        "present": present,
        "packages": versions,
        "remedy": "" if present else f"pip install gaugekit[{extra}]",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None
            )
    except OSError:
        return None
