"""The forms of a rotation: the matrices they are said to be, and no more numbers than they are said to have."""

import pytest
import torch

from gaugekit.nn.triangle import pack_triangle, unpack_triangle
from gaugekit.slicing import gauges

SIZES = [(12, 9), (12, 8), (12, 6), (12, 4), (12, 12), (5, 1)]


def bases(size, width, count=4):
    generator = torch.Generator().manual_seed(size * 100 + width)
    for _ in range(count):
        yield torch.linalg.qr(torch.randn(size, width, dtype=torch.float64, generator=generator))[0]


def matrix(frame, form, width):
    if form == "dense":
        return frame.shortcut["matrix"]
    if form == "triangular":
        return unpack_triangle(frame.shortcut["packed"], width)
    if not frame.rank:
        return torch.eye(width, dtype=torch.float64)
    factor = torch.cat([unpack_triangle(frame.shortcut["packed"], frame.rank), frame.shortcut["rest"]])
    return torch.eye(width, dtype=torch.float64) - factor @ factor.mT


@pytest.mark.parametrize("form", ["dense", "triangular", "polar"])
@pytest.mark.parametrize(("size", "width"), SIZES)
def test_a_shortcut_leads_from_one_basis_to_the_next(form, size, width):
    before = None
    for basis, frame in zip(bases(size, width), gauges.frames(bases(size, width), form), strict=True):
        projector = basis @ basis.mT
        torch.testing.assert_close(frame.basis @ frame.basis.mT, projector, rtol=0, atol=1e-13)
        if before is None:
            assert frame.shortcut == {} and torch.equal(frame.basis, basis)
        else:
            expected = before.basis.mT @ frame.basis
            torch.testing.assert_close(matrix(frame, form, width), expected, rtol=0, atol=1e-12)
            numbers = sum(tensor.numel() for tensor in frame.shortcut.values())
            assert numbers == gauges.shortcut_numbers(size, width, form)
        before = frame


def test_two_subspaces_share_the_directions_a_polar_form_leaves_out():
    frame = list(gauges.frames(bases(12, 9, 2), "polar"))[1]
    values = torch.linalg.eigvalsh(matrix(frame, "polar", 9))  # S = U Σ Uᵀ is symmetric
    assert frame.rank == 3 and int((values > 1 - 1e-12).sum()) == 6 and float(values.min()) > 0


def test_columns_that_turn_the_stream_least_are_dropped():
    whole = list(gauges.frames(bases(12, 9, 2), "polar"))[1]
    short = 1 - torch.linalg.eigvalsh(matrix(whole, "polar", 9))[:3]  # ascending σ: the largest 1 − σ first
    threshold = float(short[1:].mean()) if short[1] > short[2] else float(short[1])
    cut = list(gauges.frames(bases(12, 9, 2), "polar", drop=threshold))[1]
    assert cut.rank == 2
    values = torch.linalg.eigvalsh(matrix(cut, "polar", 9))
    torch.testing.assert_close(1 - values[:2], short[:2], rtol=0, atol=1e-12)
    assert int((values > 1 - 1e-12).sum()) == 7
    torch.testing.assert_close(cut.basis, whole.basis, rtol=0, atol=0)
    assert list(gauges.frames(bases(12, 9, 2), "polar", drop=1.0))[1].rank == 0


def test_numbers_and_products_by_hand():
    assert gauges.polar_rank(576, 464) == 112 and gauges.polar_rank(576, 200) == 200
    assert gauges.shortcut_numbers(576, 464, "dense") == 215_296
    assert gauges.shortcut_numbers(576, 464, "triangular") == 107_880
    assert gauges.shortcut_numbers(576, 464, "polar") == 112 * 113 // 2 + 352 * 112 == 45_752
    assert gauges.shortcut_numbers(576, 464, "polar", 0) == 0
    assert (
        gauges.shortcut_products(576, 464, "dense")
        == gauges.shortcut_products(576, 464, "triangular")
        == 215_296
    )
    assert gauges.shortcut_products(576, 464, "polar") == 2 * 464 * 112


def test_a_triangle_is_packed_by_rows():
    lower = torch.tensor([[1.0, 0, 0], [2, 3, 0], [4, 5, 6]])
    assert torch.equal(pack_triangle(lower), torch.arange(1.0, 7))
    assert torch.equal(unpack_triangle(torch.arange(1.0, 7), 3), lower)
