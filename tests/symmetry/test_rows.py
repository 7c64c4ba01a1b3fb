"""The choice of rows: bounded entries, spanning sets, and why the first rows are never taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit.symmetry import coordinates, max_volume, shared_partition
from gaugekit.symmetry.rows import choose


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
    for how in ("max_volume", "shared_partition"):
        rows = choose(weight, how)
        assert sorted(rows.flatten().tolist()) == list(range(6))
        assert torch.equal(coordinates(weight, rows)[0, rows[0]], torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["max_volume", "shared_partition"])
def test_what_was_fixed_so_before_keeps_its_rows(how, dtype):
    weight = heads(3, 24, 8)
    rows = choose(weight, how)
    fixed = coordinates(weight, rows).to(dtype).double()
    assert torch.equal(choose(fixed, how), rows)
    assert torch.equal(coordinates(fixed, rows), fixed)
    other = choose(
        coordinates(weight, torch.arange(8).expand(3, -1)), "max_volume"
    )  # of large entries: chosen anew
    assert not torch.equal(other.sort(1).values, torch.arange(8).expand(3, -1))


def test_bad_input():
    with pytest.raises(ValueError, match="'max_volume' or 'shared_partition', got 'first'"):
        choose(heads(1, 4, 2), "first")
    with pytest.raises(ValueError, match="heads·width = inputs, got 2·3 and 12"):
        shared_partition(heads(2, 12, 3))
    with pytest.raises(ValueError, match="full rank"):
        shared_partition(torch.zeros(2, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 3 < 4"):
        max_volume(heads(1, 3, 4))
