"""Long sequences on many threads: correct, and the same bits however many there are and however often it runs."""

import pytest
import torch

import gaugekit as gk
from gaugekit import _library
from gaugekit.ops.mask import Mask
from gaugekit.reference.shaped_combine import shaped_combine as reference
from helpers import assert_accurate

OPERATORS = torch.ops.gaugekit
NAMES = ("a", "v", "alpha", "beta", "gamma", "v0", "lam")
ROWS, WIDTH = (
    530,
    40,
)  # several chunks, the last one short; few sequences and heads, so that threads share sequences
TERMS = ("alpha", "beta", "gamma")
MASKS = {
    "causal": {"causal": True},
    "open": {},
    "open, lengths": {"key_lengths": torch.tensor([140])},
    "causal window": {"causal": True, "window": 40},
    "window": {"window": 150},
    "lengths": {"causal": True, "key_lengths": torch.tensor([400])},
    "start": {"causal": True, "query_start": torch.tensor([-200])},
    "late start, window": {"causal": True, "window": 60, "query_start": torch.tensor([200])},
    "packed": {"causal": True, "cu_seqlens": torch.tensor([0, 300, 300, ROWS], dtype=torch.int32)},
}
SIZES = {  # heads, groups, queries, terms
    "all terms": (2, 1, ROWS, (*TERMS, "lam")),
    "three terms": (2, 2, ROWS, TERMS),
    "a few queries on a long cache": (2, 1, 70, TERMS),
}

needs_binary = pytest.mark.skipif(not _library.implementation("shaped_combine"), reason="no C++ binary")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(mask, size, dtype=torch.float32):
    """Operands of the operator, None where absent; values away from zero, so that their mean counts."""
    heads, groups, queries, terms = SIZES[size]
    if queries != ROWS and (not MASKS[mask].get("causal") or "packed" in mask):
        pytest.skip("needs as many queries as keys")
    shapes = {"a": (1, heads, queries, WIDTH), "v": (1, groups, ROWS, WIDTH)} | dict.fromkeys(terms, (heads,))
    if "lam" in terms:
        shapes["v0"] = (1, groups, queries, WIDTH)
    random = {name: torch.randn(shape) + 0.5 for name, shape in shapes.items()}
    return {name: random[name].to(dtype) if name in random else None for name in NAMES}


@needs_binary
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_sequences_shared_by_threads(threads, mask, size):
    threads(3)
    operands, settings = problem(mask, size), MASKS[mask]
    weight = torch.randn_like(operands["a"])
    found = [OPERATORS.shaped_combine(*operands.values(), *Mask(**settings))]
    found += OPERATORS.shaped_combine_backward(weight, *operands.values(), *Mask(**settings))
    found = [x for x, given in zip(found, (weight, *operands.values()), strict=True) if given is not None]
    plain = []
    for dtype in (torch.float64, torch.float32):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in operands.items() if x is not None}
        out = reference(**leaves, **settings)
        plain.append([out.detach(), *torch.autograd.grad(out, leaves.values(), weight.to(dtype))])
    for x, exact, naive in zip(found, *plain, strict=True):
        assert_accurate(x, exact, naive)


@needs_binary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_number_of_threads_changes_no_bit(threads, mask, size, dtype):
    given = problem(mask, size, dtype).values()
    weight, found = torch.randn(1, SIZES[size][0], SIZES[size][2], WIDTH).to(dtype), {}
    for count in (1, 2, 3, 8):
        threads(count)
        out = OPERATORS.shaped_combine(*given, *Mask(**MASKS[mask]))
        found[count] = [out, *OPERATORS.shaped_combine_backward(weight, *given, *Mask(**MASKS[mask]))]
    for count in (2, 3, 8):
        assert all(torch.equal(x, y) for x, y in zip(found[1], found[count], strict=True))


@needs_binary
def test_a_hundred_sweeps_are_one(threads):
    given = problem("causal", "all terms").values()
    weight = torch.randn(1, 2, ROWS, WIDTH)
    first = OPERATORS.shaped_combine_backward(weight, *given, *Mask(causal=True))
    for run in range(100):
        threads(1 + run % 4)
        again = OPERATORS.shaped_combine_backward(weight, *given, *Mask(causal=True))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)), f"run {run}"


@pytest.mark.parametrize("mask", ["causal", "causal window", "packed"])
def test_a_hundred_backward_passes_are_one(threads, mask):
    """The whole of shaped_attention. Another number of threads changes the last bits of torch's own core."""
    threads(2)
    shapes = {"q": (1, 2, ROWS, 8), "k": (1, 1, ROWS, 8), "v": (1, 1, ROWS, 32)} | dict.fromkeys(TERMS, (2,))
    operands = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    weight, first = torch.randn(1, 2, ROWS, 32), None
    for run in range(100):
        out = gk.shaped_attention(**operands, **MASKS[mask])
        gradients = torch.autograd.grad(out, operands.values(), weight)
        first = first or gradients
        assert all(torch.equal(x, y) for x, y in zip(first, gradients, strict=True)), f"run {run}"
