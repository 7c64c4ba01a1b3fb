"""Every operator that a GPU has a kernel for is named by a test that runs there, and nothing keeps those tests away."""

import ast
import re
from pathlib import Path

import pytest
import torch

import gaugekit  # noqa: F401
from gaugekit.ops.shaped_combine_triton import INSTALLED

ROOT = Path(__file__).resolve().parents[2]


def operators() -> list[str]:
    """Those with a kernel under the CUDA key here, Triton's or Python's, and those of csrc/cuda, built or not."""
    every = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gaugekit::")]
    names = {name for name in every if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    binary = "\n".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return sorted({name.split("::")[1] for name in names} | set(re.findall(r'm\.impl\("(\w+)"', binary)))


def gpu_tests() -> dict[str, str]:
    """{file and name: source with its decorators} of every test function marked gpu, by itself or by its module."""
    sources = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        module = ast.parse(text)
        marks = [ast.unparse(x.value) for x in module.body
                 if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "pytestmark"]  # fmt: skip
        aliases = "|".join(
            ["pytest.mark.gpu"] + (["gpu"] if re.search(r"^gpu = pytest.mark.gpu", text, re.M) else [])
        )
        for node in module.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            own = [ast.unparse(x) for x in node.decorator_list]
            if any(re.search(rf"(?<![\w.])({aliases})\b", mark) for mark in marks + own):
                sources[f"{path.name}::{node.name}"] = ast.get_source_segment(text, node)
    return sources


def test_there_are_operators_and_tests():
    names = operators()
    assert {"packed_linear", "packed_linear_rows", "rans_decode_rows"} <= set(names)
    assert not INSTALLED or {"shaped_combine_backward", "nonlocal_energy"} <= set(names)
    assert len(gpu_tests()) > 10


@pytest.mark.parametrize("name", operators())
def test_operator_is_named_by_a_test_marked_gpu(name):
    tests = [test for test, source in gpu_tests().items() if re.search(rf"(?<!\w){name}(?!\w)", source)]
    assert tests, f"no test marked gpu names {name}"
