"""The variants that stand beside the plain kernels of the fused attention, against the same oracle."""

import pytest
import torch

from gaugekit.triton_kernels.shaped_attention_tiles import VARIANTS, use_variant
from triton_attention import backward, bounds, build, check, forward, lengths
from triton_cases import DEVICE

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

CASES = {
    "causal": {"queries": 150, "keys": 150, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "chunk of queries, K > V": {"key_width": 40, "width": 8, "queries": 20, "keys": 90, "heads": 1, "groups": 1,
                                "gains": "abg", "mask": {"causal": True}},
    "window, GQA": {"groups": 1, "queries": 140, "keys": 140, "mask": {"causal": True, "window": 90}},
    "every key, T > S": {"gains": "bg", "queries": 72, "keys": 17, "heads": 1, "groups": 1},
}  # fmt: skip


def rows_of_four(case):
    """The case as descriptors take it: they want rows of LSE and δ that start at multiples of 16 bytes."""
    return case | {name: -(-case.get(name, 40) // 4) * 4 for name in ("queries", "keys")}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_output_and_gradients_match_float64(variant, name):
    with use_variant(variant):
        check(build(torch.float16, **rows_of_four(CASES[name])))


def test_folded_scale_under_every_kind_of_length():
    mask = {"causal": True, "query_start": lengths(-3, 20), "key_lengths": lengths(50, 47)}
    with use_variant("folded"):
        check(build(batch=2, heads=2, groups=1, queries=21, keys=50, mask=mask))
        check(build(queries=70, keys=70, mask={"causal": True, "cu_seqlens": bounds(0, 0, 13, 70)}))


def test_what_descriptors_do_not_change_stays_the_same_bits():
    """The same tiles in the same order: only the way of the operands to the products differs."""
    case = build(torch.float16, queries=140, keys=140, heads=1, groups=1, mask={"causal": True})
    with use_variant("folded"):
        expected = forward(case)
    with use_variant("descriptors"):
        assert all(torch.equal(x, y) for x, y in zip(forward(case), expected, strict=True))
        gradients = backward(case)
    with use_variant("folded"):
        assert all(torch.equal(x, gradients[name]) for name, x in backward(case).items())


def test_refused_with_the_reason():
    packed = build(torch.float16, mask={"causal": True, "cu_seqlens": bounds(0, 13, 40)})
    odd = build(torch.float16, key_width=9)
    with use_variant("descriptors"):
        with pytest.raises(ValueError, match="expected neither key_lengths nor cu_seqlens"):
            forward(packed)
        with pytest.raises(ValueError, match="expected KEYS in rows"):
            forward(odd)
        with pytest.raises(ValueError, match="expected 16-bit operands, got torch.float32"):
            forward(build())
    with pytest.raises(ValueError, match="variant: expected one of"), use_variant("fast"):
        pass
