"""The sweeps of shaped_combine against the float64 oracle: every option, forward and backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.triton_kernels import shaped_combine as kernels
from gaugekit.triton_kernels import shaped_combine_launch as launch
from gaugekit.triton_kernels.shaped_combine_backward import shaped_combine_backward
from helpers import assert_accurate
from triton_cases import DEVICE, GAINS, Case, in_dtypes, masks, per_group

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def lengths(*values):
    return torch.tensor(values)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    "causal": {"mask": {"causal": True}},
    "causal, two levels": {"queries": 300, "keys": 300, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "every key": {"gains": "bg", "queries": 33, "keys": 17},
    "causal window": {"queries": 70, "keys": 70, "heads": 1, "groups": 1, "mask": {"causal": True, "window": 5}},
    "causal window past a tile": {"queries": 100, "keys": 100, "heads": 1, "groups": 1,
                                  "mask": {"causal": True, "window": 39}},
    "window of one": {"heads": 1, "groups": 1, "mask": {"causal": True, "window": 1}},
    "window on both sides": {"mask": {"window": 9}},
    "query_start, ragged, GQA": {"batch": 2, "heads": 4, "queries": 20, "keys": 50, "mask": {
        "causal": True, "query_start": lengths(-3, 40), "key_lengths": lengths(50, 47)}},
    "query_start, ragged, window": {"batch": 2, "queries": 20, "keys": 50, "mask": {
        "causal": True, "window": 7, "query_start": lengths(-3, 40), "key_lengths": lengths(50, 47)}},
    "no causal, query_start past the keys": {"batch": 2, "gains": "bg", "queries": 40, "keys": 30, "mask": {
        "window": 7, "query_start": lengths(5, -50), "key_lengths": lengths(10, 30)}},
    "lengths, one of them 0": {"batch": 2, "mask": {"key_lengths": lengths(0, 33)}},
    "packed, causal": {"queries": 90, "keys": 90, "mask": {"causal": True, "cu_seqlens": bounds(0, 0, 13, 90)}},
    "packed, window, GQA": {"heads": 4, "groups": 2, "mask": {"window": 4, "cu_seqlens": bounds(0, 13, 40)}},
    "width 1": {"width": 1, "mask": {"causal": True}},
    "width 256": {"width": 256, "queries": 20, "keys": 20, "heads": 1, "groups": 1, "mask": {"causal": True}},
    "beta alone": {"gains": "b", "queries": 20, "keys": 10, "mask": {"causal": True}},
    "gamma alone": {"gains": "g", "mask": {"causal": True}},
    "no gain": {"gains": "", "mask": {"causal": True}},
}  # fmt: skip


def forward(case: Case, out: torch.Tensor | None = None) -> torch.Tensor:
    a, v, v0, *gains = (case.here(name) for name in ("a", "v", "v0", *GAINS))
    out = torch.empty_like(a) if out is None else out
    kernels.shaped_combine(out, a, v, *gains[:3], v0, gains[3], *case.mask_here())
    return out


def backward(case: Case) -> dict[str, torch.Tensor]:
    a, v, v0, *gains = (case.here(name) for name in ("a", "v", "v0", *GAINS))
    da, delta = torch.empty_like(a), torch.empty(a.shape[:3], device=DEVICE)
    dv = torch.empty(case.batch, case.heads, case.keys, case.width, device=DEVICE)
    dv0 = None if v0 is None else torch.empty(a.shape, device=DEVICE)
    total = shaped_combine_backward(
        case.grad.to(DEVICE),
        a,
        v,
        *gains[:3],
        v0,
        gains[3],
        *case.mask_here(),
        da=da,
        delta=delta,
        dv=dv,
        dv0=dv0,
    )
    found = {"da": da, "delta": delta, "dv": per_group(dv, case.groups).to(case.dtype)}
    if dv0 is not None:
        found["dv0"] = per_group(dv0, case.groups).to(case.dtype)
    return found | {f"d{name}": total[i].float() for i, name in enumerate(GAINS) if name[0] in case.gains}


def check(case: Case) -> None:
    exact, naive = case.reference(torch.float64), case.reference(case.dtype)
    assert_accurate(forward(case).cpu(), exact["out"], naive["out"])
    for kind in (exact, naive):  # the reference's dA is β·dO
        kind["delta"] = (kind["da"] * case.operands["a"].to(kind["da"].dtype)).sum(-1)
    for name, found in backward(case).items():
        if name[1:] in GAINS:
            case.assert_gain_accurate(name[1:], found.cpu(), exact[name], naive[name])
        else:
            assert_accurate(found.cpu(), exact[name], naive[name].to(found.dtype))


NARROW = {
    "causal, two levels",
    "every key",
    "query_start, ragged, window",
    "packed, window, GQA",
    "width 256",
}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(CASES, NARROW), ids=str)
def test_output_and_gradients_match_float64(name, dtype):
    check(Case(dtype, **CASES[name]))


@st.composite
def cases(draw):
    """Small shapes under any combination of the mask's arguments, or packed; several heads are in the cases above."""
    sizes = draw(masks(24))
    if draw(st.integers(0, 3)) == 0:
        cuts = sorted(draw(st.lists(st.integers(0, sizes["keys"]), max_size=3)))
        mask = {name: sizes["mask"][name] for name in ("causal", "window")}
        mask["cu_seqlens"] = bounds(0, *cuts, sizes["keys"])
        sizes |= {"mask": mask, "batch": 1, "queries": sizes["keys"]}
    gains = draw(st.sampled_from(["abgl", "bg", "g", "ag"]))
    if not sizes["mask"]["causal"] and sizes["queries"] != sizes["keys"]:
        gains = "bg"
    return Case(heads=1, groups=1, width=8, gains=gains, **sizes)


@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(cases())
def test_any_mask(case):
    check(case)


def test_views_are_read_in_place():
    case = Case(torch.float32, batch=2, mask={"causal": True})
    expected = forward(case)
    rows = {name: case.operands[name].transpose(1, 2).flatten(2) for name in ("a", "v", "v0")}
    for name, x in rows.items():
        case.operands[name] = x.unflatten(2, (-1, case.width)).transpose(1, 2)
        assert not case.operands[name].is_contiguous()
    assert torch.equal(forward(case), expected)
    case.operands["v"] = (
        case.operands["v"].mT.contiguous().mT
    )  # columns with a stride: sums may associate otherwise
    exact, naive = (case.reference(dtype)["out"] for dtype in (torch.float64, torch.float32))
    assert_accurate(forward(case).cpu(), exact, naive)


def test_output_may_be_the_input():
    case = Case(torch.float16, mask={"causal": True, "window": 3})
    expected, a = forward(case), case.here("a").clone()
    case.operands["a"] = a
    assert torch.equal(forward(case, out=a), expected)


def test_alpha_one_beta_gamma_zero_is_v():
    case = Case(torch.float16, gains="abg", mask={"causal": True})
    case.operands |= {"alpha": torch.ones(2), "beta": torch.zeros(2), "gamma": torch.zeros(2)}
    assert torch.equal(forward(case).cpu(), case.operands["v"])


def test_uniform_attention_cancels():
    """W_Q = 0 makes A = C V; with α = β = γ = 1 what is left is V."""
    case = Case(torch.float32, gains="abg", queries=80, keys=80, mask={"causal": True})
    case.operands |= {"alpha": torch.ones(2), "beta": torch.ones(2), "gamma": torch.ones(2)}
    count = torch.arange(1, 81).view(1, 1, -1, 1)
    case.operands["a"] = case.operands["v"].cumsum(2) / count
    assert_accurate(forward(case).cpu(), case.operands["v"].double(), case.reference(torch.float32)["out"])


def test_gradients_are_the_same_bits_every_time():
    case = Case(torch.float16, queries=70, keys=70, mask={"causal": True})
    first = backward(case)
    for _ in range(100 if DEVICE == "cuda" else 2):
        assert all(torch.equal(x, first[name]) for name, x in backward(case).items())


def test_addresses_beyond_32_bits(tmp_path):
    """A batch stride and a row stride past 2³¹ elements, in a sparse file on the CPU."""
    if DEVICE == "cuda":
        far = torch.empty(2**31 + 2**16, dtype=torch.float16, device=DEVICE)
    else:
        path = tmp_path / "sparse"
        with open(path, "wb") as file:
            file.truncate(2 * (2**31 + 2**16))
        far = torch.from_file(str(path), shared=True, size=2**31 + 2**16, dtype=torch.float16)
    case = Case(
        torch.float16, batch=2, heads=1, groups=1, queries=20, keys=20, width=16, mask={"causal": True}
    )
    expected = forward(case)
    v = far.as_strided((2, 1, 20, 16), (2**31, 0, 16, 1)).copy_(case.operands["v"])
    case.operands["v"] = v
    assert torch.equal(forward(case), expected)
    rows = far.as_strided((1, 1, 2, 16), (0, 0, 2**31, 1)).copy_(torch.randn(1, 1, 2, 16))
    case = Case(torch.float16, heads=1, groups=1, queries=2, keys=2, width=16, mask={"causal": True})
    case.operands["v"] = rows.contiguous()
    expected = forward(case)
    case.operands["v"] = rows
    assert torch.equal(forward(case), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU nothing is widened")
def test_interpreter_widens_bfloat16():
    case = Case(torch.bfloat16, mask={"causal": True})
    wide = Case(torch.float32, mask={"causal": True})
    wide.operands = {name: None if x is None else x.float() for name, x in case.operands.items()}
    assert torch.equal(forward(case), forward(wide).bfloat16())


@pytest.mark.parametrize(("cuts", "chunk"), [([0, 0, 13, 90], 16), ([0, 16, 32], 16), ([0, 5], 64)])
def test_table_of_packed_chunks(cuts, chunk):
    table = launch.chunk_table(bounds(*cuts), cuts[-1], chunk).tolist()
    expected = [
        [i, c]
        for i, (begin, end) in enumerate(itertools.pairwise(cuts))
        for c in range(-(-(end - begin) // chunk))
    ]
    assert table[: len(expected)] == expected
    assert all(sequence == -1 for sequence, _ in table[len(expected) :])


def test_chunks_are_whole_tiles_and_enough():
    for rows in (1, 100, 5000, 40000):
        for heads in (1, 16, 1000):
            chunk = launch.chunk_rows(rows, heads, 32)
            assert chunk % 128 == 0 and (
                -(-rows // chunk) * heads <= launch.PROGRAMS or heads > launch.PROGRAMS
            )
