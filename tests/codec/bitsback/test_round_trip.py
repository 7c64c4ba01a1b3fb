"""A model onto the stack and back: the message identical, the gauge a rotation, and the bits that were saved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit import _library
from gaugekit.codec.bitsback import (
    Coupling,
    Group,
    Part,
    coding,
    decode,
    encode,
    permutation_bits,
    pivots,
    weights,
)
from sliced_groups import bits_of, identical, model, weight

DTYPES = [torch.float16, torch.bfloat16, torch.int8]
pytestmark = pytest.mark.skipif(not _library.backends()["cpu"].loaded, reason="needs the C++ binary")


def stored_of(monkeypatch, *arguments, **keywords):
    """(payload, report, every tensor that went onto the stack)."""
    tensors = {}
    push = weights.push

    def recording(stack, name, tensor):
        tensors[name] = tensor.clone()
        return push(stack, name, tensor)

    monkeypatch.setattr(weights, "push", recording)
    payload, report = encode(*arguments, **keywords)
    monkeypatch.undo()
    return payload, report, tensors


@pytest.mark.parametrize("seed", range(54))
def test_the_message_comes_back(monkeypatch, seed):
    """Over seeds, shapes, dtypes and spectra."""
    dimensions = [[1], [2, 3], [3, 1, 2], [17], [24, 20], [33, 64, 8], [65, 66], [12] * 5, [129]][seed % 9]
    dtype, spectrum = DTYPES[seed % 3], (0.0, 0.5, 1.5)[seed // 3 % 3]
    groups, others, couplings = model(dimensions, dtype, seed, 2 + seed % 6, spectrum)
    payload, report, stored = stored_of(monkeypatch, groups, others, couplings)
    assert identical(decode(payload), stored)
    assert {name: stored[name] for name in others}.keys() == others.keys()
    assert all(torch.equal(bits_of(stored[n]), bits_of(others[n])) for n in others)
    assert report.payload_bytes == payload.numel() and len(report.groups) == len(groups)


def shaped(draw, rows: int, dimension: int, generator) -> torch.Tensor:
    """A weight that may be short of anything: rank, distinct rows, anything but zero, range."""
    kind = draw(
        st.sampled_from(
            ["plain", "zero", "repeated", "low rank", "near degenerate", "falling", "zero columns"]
        )
    )
    x = weight(rows, dimension, generator)
    if kind == "zero":
        x[:: draw(st.integers(1, 3))] = 0
    elif kind == "repeated":
        x = x[:1].expand(rows, -1).clone()
    elif kind == "low rank":
        rank = draw(st.integers(1, dimension))
        x = weight(rows, rank, generator) @ torch.randn(rank, dimension, generator=generator)
    elif kind == "near degenerate":
        x = torch.eye(rows, dimension) + 1e-5 * x
    elif kind == "falling":
        x *= 10.0 ** -torch.linspace(0, 7, dimension)
    elif kind == "zero columns":
        x[:, dimension // 2 :] = 0
    return x


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_weights_are(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    groups, couplings = [], []
    for index in range(draw(st.integers(0, 3))):
        dimension, parts = draw(st.integers(1, 40)), []
        for part in range(draw(st.integers(1, 3))):
            dtype, axis = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1))
            x = shaped(draw, draw(st.integers(1, 60)), dimension, generator)
            one_axis = dtype != torch.int8 and draw(st.booleans())
            parts.append(Part(f"{index}.{part}", x[0] if one_axis else x, dtype, axis))
        groups.append(Group(dimension, parts))
        if index and draw(st.booleans()):
            left = draw(st.integers(0, index - 1))
            x = torch.randn(groups[left].dimension, dimension, generator=generator)
            couplings.append(Coupling(f"{index}.s", left, index, x, draw(st.sampled_from(DTYPES))))
    others = {"before": torch.randn(draw(st.integers(0, 2000)), generator=generator)}
    with pytest.MonkeyPatch.context() as patch:
        payload, report, stored = stored_of(patch, groups, others, couplings)
    assert identical(decode(payload), stored)
    assert report.seed_bits >= 0 and all(g.seed_bits >= 0 for g in report.groups)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gauge_is_a_rotation(dtype):
    """What is computed with the stored tensors is what was computed before, up to the rounding that storing them has
    anyway: x Wᵀ through a group, and through a coupling between two.
    """
    groups, others, couplings = model([48, 40], dtype)
    stored = decode(encode(groups, others, couplings)[0])

    def value(name, axis=1):
        tensor = stored[name].double()
        if stored[name].dtype == torch.int8:
            tensor = tensor * stored[f"{name}.scale"].double()[:, None]
        return tensor.T if axis == 0 else tensor

    for index, group in enumerate(groups):
        first, second = (part.weight.double() for part in group.parts[:2])
        rotated = value(f"{index}.in") @ value(f"{index}.out", 0).T
        plain = [weights.store("x", w.float(), dtype) for w in (first, second)]
        plain = [t[0].double() * (t[1].double()[:, None] if len(t) > 1 else 1) for t in plain]
        noise = (plain[0] @ plain[1].T - first @ second.T).norm()
        assert (rotated - first @ second.T).norm() < 1.5 * noise
    exact = (
        groups[0].parts[0].weight.double()
        @ couplings[0].weight.double()
        @ groups[1].parts[0].weight.double().T
    )
    through = value("0.in") @ value("1.shortcut") @ value("1.in").T
    assert (through - exact).norm() < {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.int8: 3e-2}[
        dtype
    ] * exact.norm()


@pytest.mark.parametrize(
    ("dtype", "net"),
    [(torch.float16, 11.3), (torch.bfloat16, 8.4), (torch.int8, 5.5)],
    ids=["fp16", "bf16", "int8"],
)
def test_net_bits_a_degree_of_freedom(dtype, net):
    groups, others, couplings = model([128, 192], dtype)
    _, report = encode(groups, others, couplings)
    for group, dimension in zip(report.groups, (128, 192), strict=True):
        assert group.degrees_of_freedom == dimension * (dimension - 1) // 2
        assert group.realised_bits >= net * group.degrees_of_freedom
        assert group.nominal_bits == group.degrees_of_freedom * 8 * dtype.itemsize
        if dtype == torch.float16:
            assert group.share >= 0.70
    assert report.seed_bits == 0


def test_the_report_is_what_the_payload_is_smaller_by(monkeypatch):
    """Beside the same tensors pushed onto a stack with no rotation popped."""
    groups, others, couplings = model([96, 96, 96], torch.float16)
    payload, report, stored = stored_of(monkeypatch, groups, others, couplings)
    plain, _ = encode([], stored)
    saved = 8 * (plain.numel() - payload.numel())
    header = 8 * 1000 * len(groups)  # what the header says of groups and not of others
    assert report.realised_bits - header < saved < report.realised_bits + header
    assert saved > 10 * report.degrees_of_freedom


def test_an_empty_stack_gives_seed_which_is_counted():
    groups, _, couplings = model([64, 64], torch.float16)
    payload, report = encode(groups, {}, couplings)
    assert report.groups[0].seed_bits > 0 and report.groups[1].seed_bits == 0
    assert abs(report.groups[0].seed_bits - report.groups[0].popped_bits) < 600  # all but the first states
    assert report.realised_bits < sum(group.realised_bits for group in report.groups)
    assert len(decode(payload)) == 7


def test_paths_and_threads_write_the_same_bytes():
    groups, others, couplings = model([80, 72], torch.float16)
    before = torch.get_num_threads()
    payloads = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            payloads += [encode(groups, others, couplings, path=path)[0] for path in (-1, 0, 1, 2)]
            assert identical(decode(payloads[0], path=0), decode(payloads[0], path=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(payload, payloads[0]) for payload in payloads)


def test_progress_is_told():
    calls = []
    groups, others, couplings = model([4, 5, 6], torch.float16)
    payload, _ = encode(groups, others, couplings, progress=lambda done, total: calls.append((done, total)))
    decode(payload, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2


def test_rows_are_chosen_where_even_ones_are_dependent():
    """Even rows, one in six, that are all alike: the greedy choice finds the others, and the payload tells it."""
    generator = torch.Generator().manual_seed(0)
    x = weight(6 * 64, 64, generator)
    x[3::6] = x[3]
    group = Group(64, [Part("w", x, torch.float16)])
    rows, _ = coding._reference_gauge(group, -1)
    assert not torch.equal(rows, pivots.evenly(384, 64)) and len(set(rows.tolist())) == 64
    assert (rows % 6 == 3).sum() <= 1
    payload, report = encode([group], {"base": torch.randn(40_000)})
    assert report.groups[0].pivots_bits > 0
    assert report.groups[0].realised_bits > 11 * report.groups[0].degrees_of_freedom
    assert decode(payload)["w"].shape == x.shape


def test_a_group_of_low_rank_hides_a_smaller_rotation():
    generator = torch.Generator().manual_seed(0)
    x = weight(200, 10, generator) @ torch.randn(10, 50, generator=generator)
    payload, report = encode([Group(50, [Part("w", x, torch.float16)])], {"base": torch.randn(20_000)})
    assert report.groups[0].degrees_of_freedom == 10 * 49 - 45
    assert report.groups[0].realised_bits > 9 * report.groups[0].degrees_of_freedom
    assert decode(payload)["w"].shape == (200, 50)


def test_int8_scales_are_of_the_stored_rows():
    """[out, in]: 127 is the largest magnitude of each row of the stored tensor, whichever axis is rotated."""
    groups, others, _ = model([32], torch.int8)
    stored = decode(encode(groups, others)[0])
    for name, rows in (("0.in", 96), ("0.out", 32)):
        assert stored[name].dtype == torch.int8 and stored[f"{name}.scale"].shape == (rows,)
        assert (stored[name].abs().amax(1) == 127).all()


def test_permutations_are_counted():
    assert permutation_bits(1) == 0
    assert abs(permutation_bits(5) - 6.906890595608519) < 1e-12  # log2 120
    neurons, heads = permutation_bits(16_384), permutation_bits(32)
    weights = 4096 * 3272 * 4 + 2 * 16_384 * 3272 + 2 * 3272**2  # of a layer of OPT-6.7B, 20 % sliced
    assert round(100 * (neurons + heads) / (16 * weights), 3) == 0.007


def bad(**changes):
    fields = {"name": "w", "weight": torch.randn(6, 4), "dtype": torch.float16} | changes
    return [Group(4, [Part(**fields)])]


@pytest.mark.parametrize(
    ("groups", "others", "couplings", "sentence"),
    [
        (bad(dtype=torch.float32), {}, [], "expected a dtype among float16, bfloat16, int8"),
        (bad(weight=torch.randn(6, 5)), {}, [], r"expected a weight \[rows, 4\] or \[4\], got \[6, 5\]"),
        (bad(weight=torch.randn(6, 4).half()), {}, [], "expected a float32 or float64 weight"),
        (bad(weight=torch.full((6, 4), torch.inf)), {}, [], "expected finite weights"),
        (bad(weight=torch.full((6, 4), 1e6)), {}, [], "beyond torch.float16"),
        (bad(axis=2), {}, [], "expected axis 0 or 1, got 2"),
        (bad(weight=torch.randn(4), dtype=torch.int8), {}, [], "expected two axes for int8"),
        ([Group(4, [])], {}, [], "expected at least one part"),
        (
            [Group(0, [Part("w", torch.zeros(3, 0), torch.float16)])],
            {},
            [],
            "a dimension of 1 to 65,535, got 1, 0",
        ),
        (bad(), {"w": torch.zeros(1)}, [], "got more than one 'w'"),
        (bad(dtype=torch.int8), {"w.scale": torch.zeros(1)}, [], "got more than one 'w.scale'"),
        (
            bad(),
            {},
            [Coupling("s", 0, 0, torch.randn(4, 4), torch.float16)],
            "expected 0 <= left < right < 1",
        ),
        (bad(), {"c": torch.zeros(1, dtype=torch.complex64)}, [], "expected a dtype among"),
    ],
)
def test_bad_input(groups, others, couplings, sentence):
    with pytest.raises(ValueError, match=sentence):
        encode(groups, others, couplings)


def test_a_coupling_of_another_shape_is_refused():
    groups, others, couplings = model([4, 5], torch.float16)
    couplings[0].weight = couplings[0].weight.T
    with pytest.raises(ValueError, match=r"expected a weight \[4, 5\], got \[5, 4\]"):
        encode(groups, others, couplings)
