"""What the sources of triton_kernels say of their kernels, read and not imported: tests here may not touch triton."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "triton_kernels"


@functools.cache
def functions() -> dict[str, ast.FunctionDef]:
    """Every function under ``@triton.jit``, by name; no two files have the same name for two of them."""
    by_name: dict[str, ast.FunctionDef] = {}
    for path in sorted(SOURCES.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                assert node.name not in by_name, f"{path.name}: a second {node.name}"
                by_name[node.name] = node
    return by_name


def _calls(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}


def launched() -> set[str]:
    """The kernels: what no other function of the sources calls, so that only a launch can run it."""
    return functions().keys() - {name for function in functions().values() for name in _calls(function)}


def multiplies(kernel: str) -> bool:
    """Whether the kernel, or a function it calls, has a ``tl.dot``."""
    calls = _calls(functions()[kernel])
    return "tl.dot" in calls or any(multiplies(name) for name in calls & functions().keys())
