"""Laws 3 and 4: every operator is checked against its oracle by the full set of means, with derived tolerances."""

import ast
from pathlib import Path

import pytest
import torch

import gaugekit  # noqa: F401

TESTS = Path(__file__).resolve().parents[1]
REFERENCE = TESTS.parent / "python" / "gaugekit" / "reference"
CODES = {"rans", "canonical_qr", "bitsback"}  # exact bits: no gradients, no tolerance
# how the operator runs is decided inside a graph, or on which rows and with which matrix
CHOOSERS = {"packed_linear_planned": "packed_linear", "packed_experts": "packed_linear"}
# no gradient of their own: where one is asked for, the composition runs under torch's autograd
COMPOSED = {"single_cache_attention"}
OPERATORS = sorted({path.stem for path in REFERENCE.glob("*.py")} - {"__init__"} - CODES)
MEANS = {
    "gradcheck": "float64 gradients by finite differences",
    "opcheck": "schema, fake, autograd and compile registration",
    "fullgraph": "torch.compile without a graph break",
    "assert_accurate": "the derived tolerance",
    "pytest.raises": "bad input",
    "reference": "the oracle",
}


def sources(stem: str) -> str:
    return "\n".join(path.read_text() for path in sorted((TESTS / "ops").glob(f"test_{stem}*.py")))


def test_every_operator_with_gradients_has_an_oracle():
    """The operators checked below are those that are registered with a gradient: none is left out."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gaugekit::")]
    gradients = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")]
    registered = {name.removeprefix("gaugekit::") for name in gradients}
    assert registered - set(CHOOSERS) == set(OPERATORS) - COMPOSED
    for name, stem in CHOOSERS.items():
        assert name in registered and f"opcheck(torch.ops.gaugekit.{name}.default" in sources(stem)


@pytest.mark.parametrize("stem", OPERATORS)
@pytest.mark.parametrize("means", MEANS)
def test_operator_is_checked_by(stem, means):
    assert means in sources(stem), f"tests of {stem} lack {means}: {MEANS[means]}"


@pytest.mark.parametrize("path", sorted((TESTS / "ops").glob("test_*.py")), ids=lambda p: p.stem)
def test_no_hand_picked_tolerance(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name == "gradcheck":  # its tolerances are those of finite differences
                continue
            for keyword in node.keywords:
                if keyword.arg in {"atol", "rtol"} and isinstance(keyword.value, ast.Constant):
                    value = keyword.value.value
                    assert not value, f"line {node.lineno}: {name}(…, {keyword.arg}={value})"
