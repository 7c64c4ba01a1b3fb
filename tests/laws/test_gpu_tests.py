"""Every operator that a GPU has a kernel for is called by a test that runs there; nothing keeps those away."""

import ast
import re
from pathlib import Path

import pytest
import torch

import gaugekit  # noqa: F401
from gaugekit.ops.shaped_combine.cuda import INSTALLED

ROOT = Path(__file__).resolve().parents[2]


def operators() -> list[str]:
    """Those with a kernel under the CUDA key here, Triton's or Python's, and those of csrc/cuda, built or not."""
    every = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gaugekit::")]
    names = {name for name in every if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    binary = "\n".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return sorted({name.split("::")[1] for name in names} | set(re.findall(r'm\.impl\("(\w+)"', binary)))


def gpu_tests() -> dict[str, str]:
    """{file and name: code, decorators included, docstring left out} of every test function marked gpu.

    By itself, by its module, or by one of its parameters that the module lists under a name.
    """
    sources = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text())
        marks = {
            ast.unparse(x.targets[0])
            for x in module.body
            if isinstance(x, ast.Assign) and "pytest.mark.gpu" in ast.unparse(x.value)
        }
        names = "|".join(["pytest.mark.gpu", *marks])
        for node in module.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            decorators = [ast.unparse(x) for x in node.decorator_list]
            if "pytestmark" in marks or any(re.search(rf"(?<![\w.])({names})\b", x) for x in decorators):
                if ast.get_docstring(node) is not None:
                    del node.body[0]
                sources[f"{path.name}::{node.name}"] = ast.unparse(node)
    return sources


def runs(name: str, code: str) -> bool:
    """The operator is called there by its name; one of a backward pass, by the forward's and a gradient."""
    forward = name.removesuffix("_backward")
    named = re.search(rf"(?<!\w){forward}(?!\w)", code)
    return bool(named) and (
        forward == name or re.search(r"\bautograd\.grad\b|assert_both_ways", code) is not None
    )


def test_there_are_operators_and_tests():
    names = operators()
    assert {"packed_linear", "packed_linear_rows", "rans_decode_rows"} <= set(names)
    assert not INSTALLED or {"shaped_combine_backward", "nonlocal_energy"} <= set(names)
    assert len(gpu_tests()) > 10


@pytest.mark.parametrize("name", operators())
def test_operator_runs_in_a_test_marked_gpu(name):
    tests = [test for test, source in gpu_tests().items() if runs(name, source)]
    assert tests, f"no test marked gpu runs {name}"
