"""Heads turned until rows are triangular: exact, the same wherever on the orbit one starts, and found again."""

from dataclasses import replace

import pytest
import torch

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry import SYMMETRIES
from gaugekit.symmetry.rows import CHOICES, choose, removed, triangular, turned

NOISE = 1e-13


def heads(condition=1.0, count=3, inputs=24, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, inputs, width, dtype=torch.float64, generator=generator)
    if condition > 1:
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)), width, dtype=torch.float64)
        weight = u @ (spectrum[:, None] * vh)
    return weight


def rotations(count, width, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, width, width, dtype=torch.float64, generator=generator)).Q


def blocks(weight, rows):
    return weight.gather(1, rows[..., None].expand(-1, -1, weight.shape[2]))


def check(weight, rows, fixed, turn):
    identity = torch.eye(weight.shape[2], dtype=torch.float64)
    assert (turn.mT @ turn - identity).abs().max() < NOISE
    assert (fixed @ turn.mT - weight).abs().max() <= NOISE * weight.abs().max()
    block = blocks(fixed, rows)
    assert torch.equal(block, block.tril()) and (block.diagonal(dim1=1, dim2=2) >= 0).all()


def test_a_triangle_by_hand():
    """The second row is the longest, so that the first channel is its direction; the first has most of what is left."""
    weight = torch.tensor([[[3.0, 4.0], [4.0, -4.0], [1.0, 1.0]]], dtype=torch.float64)
    rows = triangular(weight)
    assert rows.tolist() == [[1, 0]]
    fixed, turn = turned(weight, rows)
    root = 2**0.5
    expected = torch.tensor([[[-1 / root, 7 / root], [4 * root, 0], [0, root]]], dtype=torch.float64)
    torch.testing.assert_close(fixed, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(turn, torch.tensor([[[1, 1], [-1, 1]]]).double() / root)
    check(weight, rows, fixed, turn)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12])
@pytest.mark.parametrize("size", [(3, 24, 8), (2, 5, 5), (1, 7, 1)])
def test_no_entry_exceeds_the_diagonal_of_its_channel_however_ill_conditioned(size, condition):
    weight = heads(condition, *size)
    rows = triangular(weight)
    fixed, turn = turned(weight, rows)
    check(weight, rows, fixed, turn)
    diagonal = blocks(fixed, rows).diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all() and (fixed.abs() <= diagonal[:, None] * (1 + 1e-9)).all()


def test_the_triangle_is_the_same_wherever_on_the_orbit_it_starts():
    weight = heads(100.0)
    rows = triangular(weight)
    moved = weight @ rotations(3, 8)
    assert torch.equal(triangular(moved), rows)
    torch.testing.assert_close(turned(moved, rows)[0], turned(weight, rows)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e9])
def test_what_was_turned_before_stays_whatever_its_dtype_rounded(dtype, condition):
    weight = heads(condition)
    rows = triangular(weight)
    rounded = turned(weight, rows)[0].to(dtype).double()
    if dtype != torch.float16:
        assert torch.equal(triangular(rounded), rows)
    again, turn = turned(rounded, triangular(rounded))
    assert torch.equal(again, rounded)
    assert torch.equal(turn, torch.eye(8, dtype=torch.float64).expand_as(turn))


def test_a_head_alone_may_be_turned_already():
    weight = heads()
    fixed, _ = turned(weight, triangular(weight))
    mixed = torch.stack([fixed[0], weight[1], fixed[2]])
    again, turn = turned(mixed, triangular(mixed))
    torch.testing.assert_close(again, fixed, rtol=1e-12, atol=1e-12)
    assert torch.equal(again[[0, 2]], fixed[[0, 2]])
    assert [bool((one == torch.eye(8)).all()) for one in turn] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_heads_of_lower_rank_leave_channels_idle(dtype):
    """A dead head, one of rank 3, one that reads no input but its last ten: none is in the way of another."""
    weight = heads()
    weight[0] = 0
    weight[1, :, 3:] = weight[1, :, :3] @ torch.randn(3, 5, dtype=torch.float64)
    weight[1] = weight[1] @ rotations(1, 8)[0]
    weight[2, :14] = 0
    rows = triangular(weight)
    assert all(len(set(one)) == 8 for one in rows.tolist()) and (rows[2] >= 14).all()
    fixed, turn = turned(weight, rows)
    check(weight, rows, fixed, turn)
    assert [int(one.any(0).sum()) for one in fixed] == [0, 3, 8]
    rounded = fixed.to(dtype).double()
    again, turn = turned(rounded, triangular(rounded))
    assert torch.equal(again, rounded) and torch.equal(turn, torch.eye(8).double().expand(3, -1, -1))


@pytest.mark.parametrize("stairs", [1, 8])
def test_zeros_that_happen_to_be_there_are_no_triangle_of_pivots(stairs):
    """A head counts as turned where a whole triangle is there, each of its diagonal the largest of its channel."""
    weight = heads()
    for channel in range(stairs):
        weight[:, channel, channel + 1 :] = 0
        weight[:, channel, channel] = 1.0
    rows = triangular(weight)
    fixed, turn = turned(weight, rows)
    check(weight, rows, fixed, turn)
    assert (turn - torch.eye(8)).abs().amax((1, 2)).min() > 0.1
    assert (fixed.abs() <= blocks(fixed, rows).diagonal(dim1=1, dim2=2)[:, None] * (1 + 1e-9)).all()


def view(biases=True, groups=2, repeats=2):
    generator = torch.Generator().manual_seed(5)

    def projection(count, inputs, outputs, bias):
        draw = torch.randn(count, inputs + 1, outputs, dtype=torch.float64, generator=generator)
        return Projection(draw[:, :-1], draw[:, -1] if bias else None)

    total = groups * repeats
    out = projection(total, 5, 12, False)
    bias = torch.randn(12, dtype=torch.float64, generator=generator) if biases else None
    q, k, v = (
        projection(count, 12, width, biases) for count, width in ((total, 3), (groups, 3), (groups, 5))
    )
    return AttentionView(q, k, v, replace(out, bias=bias), 0.5)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("name", "part", "width"), [("value_output", "v", 5), ("query_key", "k", 3)])
def test_fix_stays_on_the_orbit_and_keeps_all_lengths(name, part, width, biases):
    """Biases that are not folded turn with their heads, whatever the rank."""
    symmetry, before = SYMMETRIES[name], view(biases)
    after = symmetry.fix(before, "triangular")
    assert symmetry.contains(before, after) and getattr(after, part).triangular
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert (after.attend(x) - before.attend(x)).norm() < NOISE * before.attend(x).norm()
    block = blocks(getattr(after, part).weight, getattr(after, part).rows)
    assert int((block == 0).sum()) == symmetry.removed(before, "triangular") == 2 * (width * (width - 1) // 2)
    for one in "qkvo":
        lengths = [getattr(each, one).weight.flatten(1).norm(dim=1) for each in (before, after)]
        torch.testing.assert_close(*lengths, rtol=1e-13, atol=0)
    again = symmetry.fix(after, "triangular")
    for one in "qkvo":
        for kind in ("weight", "bias"):
            mine, other = (getattr(getattr(each, one), kind) for each in (again, after))
            assert mine is other is None or torch.equal(mine, other), (one, kind)


def test_fix_does_not_depend_on_where_on_the_orbit_it_starts():
    for name, width in (("value_output", 5), ("query_key", 3)):
        symmetry, start = SYMMETRIES[name], view()
        moved = symmetry.act(start, rotations(2, width))
        one, other = (symmetry.fix(each, "triangular") for each in (start, moved))
        for part in "qkvo":
            torch.testing.assert_close(
                getattr(one, part).weight, getattr(other, part).weight, rtol=1e-11, atol=1e-12
            )


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_a_product_loses_to_bfloat16_what_it_lost_before_and_less_where_its_factors_nearly_cancel(condition):
    """Turned, a head that is long in some directions alone has them in channels of their own, where each number is
    rounded in proportion to its own channel's size.
    """
    weight, other = heads(condition, 4, 64, 8), heads(1.0, 4, 64, 8, seed=1).mT

    def loss(left, right):
        product = weight @ out
        return (left.bfloat16().double() @ right.bfloat16().double() - product).norm() / product.norm()

    rows = triangular(weight)
    fixed, turn = turned(weight, rows)
    out = other
    assert loss(fixed, turn.mT @ out) < 1.1 * loss(weight, out)
    out = torch.linalg.inv(torch.linalg.qr(weight).R) @ other  # long where the head is short
    assert loss(fixed, turn.mT @ out) < (1.1 if condition == 1 else 0.05) * loss(weight, out)


def test_counts_and_bad_input():
    assert [removed(8, how) for how in CHOICES] == [64, 64, 64, 28]
    weight = heads()
    assert torch.equal(choose(weight, "triangular", torch.ones(3, 24)), triangular(weight))
    with pytest.raises(ValueError, match="at least as many inputs as the head is wide, got 3 < 4"):
        triangular(heads(1.0, 1, 3, 4))
    rotary = replace(view(), rotary=2)
    assert SYMMETRIES["query_key"].removed(rotary, "triangular") == 0
    assert SYMMETRIES["query_key"].fix(rotary, "triangular") is rotary
    assert SYMMETRIES["key_bias"].removed(view(), "triangular") == 6
