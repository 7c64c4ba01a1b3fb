"""The choice of rows: bounded entries, spanning sets, and why the first rows are never taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.symmetry import balanced, coordinates, max_volume, shared_partition
from gaugekit.symmetry.rows import CHOICES, choose

BLOCKS = [how for how in CHOICES if how != "triangular"]  # of an identity


def heads(count, inputs, width, condition=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, inputs, width, dtype=torch.float64, generator=generator)
    if condition > 1:
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        weight = u @ (torch.logspace(0, -torch.log10(torch.tensor(condition)), width)[:, None].double() * vh)
    return weight


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 3),
    width=st.integers(1, 9),
    more=st.integers(0, 30),
    condition=st.sampled_from([1.0, 1e4, 1e8]),
    seed=st.integers(0, 1000),
)
def test_max_volume_bounds_every_entry(count, width, more, condition, seed):
    weight = heads(count, width + more, width, condition, seed)
    rows = max_volume(weight)
    found = coordinates(weight, rows)
    assert found.abs().max() <= 1.02 + 1e-6
    assert all(len(set(one.tolist())) == width for one in rows)
    basis = weight.gather(1, rows[..., None].expand(-1, -1, width))
    torch.testing.assert_close(found @ basis, weight, rtol=0, atol=1e-13 * float(weight.abs().max()) * width)


def test_max_volume_finds_the_best_pair_of_a_small_case():
    weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 2.0]]], dtype=torch.float64)
    assert set(max_volume(weight)[0].tolist()) == {2, 3}


def rounded_product(weight, rows, partner):
    """What ``balanced`` says that rounding comes to, head by head: Σ_j ‖C_j‖² partner[P_j]."""
    return (coordinates(weight, rows).square().sum(1) * partner.gather(1, rows)).sum(1)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_balanced_rows_are_better_than_those_of_largest_volume_and_no_swap_betters_them(condition):
    weight = heads(2, 14, 3, condition)
    other = heads(2, 20, 3, seed=1) * torch.tensor([1, 0.1, 3.0], dtype=torch.float64)
    partner = (weight @ other.mT).square().sum(2)
    rows = balanced(weight, partner)
    least = rounded_product(weight, rows, partner)
    assert (least < rounded_product(weight, max_volume(weight), partner)).all()
    for column in range(3):
        for row in range(14):
            swapped = rows.clone()
            swapped[:, column] = row
            apart = (swapped.sort(1).values.diff(dim=1) > 0).all(1)
            assert (rounded_product(weight, swapped, partner)[apart] > 0.999 * least[apart]).all()


def test_balanced_rows_lose_less_to_bfloat16():
    """The product of a head from rounded factors, its block ill-conditioned: what the choice is made for."""
    weight = heads(4, 64, 8, condition=1e3)
    other = heads(4, 64, 8, seed=1).mT
    product = weight @ other

    def loss(rows):
        basis = weight.gather(1, rows[..., None].expand(-1, -1, 8))
        left, right = (part.bfloat16().double() for part in (coordinates(weight, rows), basis @ other))
        return (left @ right - product).norm() / product.norm()

    assert loss(balanced(weight, product.square().sum(2))) < 0.95 * loss(max_volume(weight))


def test_a_head_of_lower_rank_keeps_its_pivots():
    weight = heads(2, 10, 4)
    weight[0, :, 3] = weight[0, :, 2]
    rows = balanced(weight, torch.ones(2, 10, dtype=torch.float64))
    assert torch.equal(rows[0], max_volume(weight)[0])
    assert len(set(rows[1].tolist())) == 4


def test_shared_partition_is_one_permutation_and_better_than_a_random_one():
    weight = heads(6, 48, 8)
    rows = shared_partition(weight)
    assert sorted(rows.flatten().tolist()) == list(range(48))

    def volume(partition):
        blocks = weight.gather(1, partition[..., None].expand(-1, -1, 8))
        return torch.linalg.slogdet(blocks).logabsdet.sum()

    mine = volume(rows)
    assert mine > max(volume(torch.randperm(48).reshape(6, 8)) for _ in range(20))
    found = coordinates(weight, rows)
    assert found.abs().max() < coordinates(weight, torch.arange(48).reshape(6, 8)).abs().max()
    flat = rows.flatten()
    for a in range(48):  # no pair left whose exchange gains more than the bound
        for b in range(a + 1, 48):
            if a // 8 != b // 8:
                gain = (found[a // 8, flat[b], a % 8] * found[b // 8, flat[a], b % 8]).abs()
                assert gain <= 1.02 + 1e-9


def test_one_head_as_wide_as_the_model():
    weight = heads(1, 6, 6)
    for how in CHOICES:
        rows = choose(weight, how, weight.square().sum(2))
        assert sorted(rows.flatten().tolist()) == list(range(6))
        assert torch.equal(coordinates(weight, rows)[0, rows[0]], torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", BLOCKS)
def test_what_was_fixed_so_before_keeps_its_rows(how, dtype):
    weight = heads(3, 24, 8)
    partner = heads(3, 24, 1, seed=1)[..., 0].square()
    rows = choose(weight, how, partner)
    fixed = coordinates(weight, rows).to(dtype).double()
    assert torch.equal(choose(fixed, how, partner), rows)
    assert torch.equal(coordinates(fixed, rows), fixed)
    first = coordinates(weight, torch.arange(8).expand(3, -1))
    other = choose(first, "max_volume", partner)  # of large entries: chosen anew
    assert not torch.equal(other.sort(1).values, torch.arange(8).expand(3, -1))


def test_bad_input():
    with pytest.raises(ValueError, match="balanced, max_volume, shared_partition, triangular; got 'first'"):
        choose(heads(1, 4, 2), "first", torch.ones(1, 4))
    with pytest.raises(ValueError, match="heads·width = inputs, got 2·3 and 12"):
        shared_partition(heads(2, 12, 3))
    with pytest.raises(ValueError, match="full rank"):
        shared_partition(torch.zeros(2, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 3 < 4"):
        max_volume(heads(1, 3, 4))
