"""The mathematics of one layer: truncation is the best in the metric it claims, and rotary pairs stay whole."""

from dataclasses import replace

import pytest
import torch

from gaugekit.calibration.streaming import Moments
from gaugekit.checkpoint.compact import low_rank
from gaugekit.models import AttentionView, Projection, used_channels
from gaugekit.rank import Truncate, head_ranks, rounding_norm, spectrum
from gaugekit.rank.truncation import cut
from gaugekit.symmetry import GaugeFix, count


def random_view(heads=4, groups=2, inputs=20, width=6, rotary=0, biases=True):
    def part(count, out):
        bias = torch.randn(count, out, dtype=torch.float64) if biases else None
        return Projection(torch.randn(count, inputs, out, dtype=torch.float64), bias)

    o = Projection(torch.randn(heads, 5, inputs, dtype=torch.float64))
    q, k, v = part(heads, width), part(groups, width), part(groups, 5)
    return AttentionView(q, k, v, o, scale=0.2, rotary=rotary, causal=True)


def moments(rows):
    return Moments(len(rows), rows.sum(0), rows.mT @ rows)


def scores(view, x):
    """(x W_Q + b_Q)(x W_K)ᵀ of every head, each row less its mean: what the softmax sees."""
    q = torch.einsum("nd,hdk->hnk", x, view.q.weight) + view.q.bias[:, None]
    k = torch.einsum("nd,hdk->hnk", x, view.k.weight).repeat_interleave(view.repeats, 0)
    found = q @ k.mT
    return found - found.mean(-1, keepdim=True)


def test_plain_spectrum_is_that_of_the_product():
    view = random_view(groups=4)
    product = torch.cat([view.q.weight, view.q.bias[:, None]], 1) @ view.k.weight.mT
    torch.testing.assert_close(spectrum(view).values, torch.linalg.svdvals(product)[:, :6])


@pytest.mark.parametrize("aware", [False, True])
def test_full_rank_is_the_same_function(aware):
    """The factors of every component together are W_Q W_Kᵀ again, although none of the roots was inverted."""
    view, x = random_view(), torch.randn(50, 20, dtype=torch.float64) * torch.logspace(0, -4, 20)
    found = spectrum(view, moments(x) if aware else None)
    q = torch.cat([view.q.weight, view.q.bias[:, None]], 1) @ found.turn_q.repeat_interleave(2, 0)
    k = view.k.weight @ found.turn_k
    before = torch.cat([view.q.weight, view.q.bias[:, None]], 1) @ view.k.weight.repeat_interleave(2, 0).mT
    assert (q @ k.repeat_interleave(2, 0).mT - before).norm() < 1e-9 * before.norm()
    assert Truncate(6).layer(view) is view


def test_energy_is_the_squared_error_of_the_scores():
    """What goes is the sum of the squares that go, on the very tokens that were counted: Eckart and Young."""
    view, x = (
        random_view(),
        torch.randn(40, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64),
    )
    found = spectrum(view, moments(x))
    for rank in (1, 3, 5):
        after = cut(view, found, [rank, rank])
        error = (scores(after, x) - scores(view, x)).square().sum((1, 2)).unflatten(0, (2, 2)).sum(1)
        torch.testing.assert_close(error / 40**2, found.values[:, rank:].square().sum(1))
        plain = cut(view, spectrum(view), [rank, rank])
        assert (scores(plain, x) - scores(view, x)).norm() > (scores(after, x) - scores(view, x)).norm()


def test_ranks_by_energy_are_the_smallest():
    found = spectrum(random_view())
    for energy in (0.5, 0.9, 1.0):
        for rank, row in zip(found.needed(energy), found.values.square(), strict=True):
            assert row[:rank].sum() >= energy * row.sum() * (1 - 1e-12)
            assert rank == 1 or row[: rank - 1].sum() < energy * row.sum()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_channels_go_in_whole_pairs_chosen_by_energy(interleaved):
    view = replace(random_view(rotary=6), interleaved=interleaved)
    pair = [2, 3] if interleaved else [1, 4]
    for part, gain in ((view.q, 100.0), (view.k, 100.0)):
        part.weight[..., pair[1]] *= gain
    after = Truncate(2).layer(view)
    assert after.channels == (tuple(pair), tuple(pair)) == used_channels(after)
    assert torch.equal(after.q.weight[..., pair], view.q.weight[..., pair])  # the numbers themselves stay
    assert torch.equal(after.k.bias[:, pair], view.k.bias[:, pair])  # a key bias turns, so it can be seen
    assert after.q.weight[..., [i for i in range(6) if i not in pair]].count_nonzero() == 0
    with pytest.raises(
        ValueError, match="expected an even number, since rotary channels go in whole pairs; got 3"
    ):
        Truncate(3).layer(view)
    assert Truncate(6).layer(view) is view
    x = torch.randn(1, 9, 20, dtype=torch.float64)
    close = (after.attend(x) - view.attend(x)).norm() / view.attend(x).norm()
    assert close < 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotary_keeps_its_plain_part_free(interleaved):
    """Channels (0, 2) and (1, 3), or (0, 1) and (2, 3), turn in pairs; of 4 and 5 an odd rank keeps one, the strongest
    direction of both."""
    view = replace(random_view(rotary=4), interleaved=interleaved)
    pairs = [(0, 1, 4), (2, 3, 4)] if interleaved else [(0, 2, 4), (1, 3, 4)]
    ranks = {rank: Truncate(rank).layer(view) for rank in (1, 3, 5)}
    for rank, after in ranks.items():
        for kept in after.channels:
            assert kept in {1: [(4,)], 3: pairs, 5: [(0, 1, 2, 3, 4)]}[rank]
    plain = [torch.cat([part.weight, part.bias[:, None]], 1)[..., 4:] for part in (view.q, view.k)]
    turned = [torch.cat([part.weight, part.bias[:, None]], 1)[..., 4] for part in (ranks[1].q, ranks[1].k)]
    for group in range(2):
        queries, keys = plain[0][2 * group : 2 * group + 2].flatten(0, 1), plain[1][group, :-1]
        u, values, v = torch.linalg.svd(queries @ keys.mT)
        strongest = values[0] * torch.outer(u[:, 0], v[0])
        found = torch.outer(turned[0][2 * group : 2 * group + 2].flatten(), turned[1][group, :-1])
        torch.testing.assert_close(found, strongest, rtol=1e-10, atol=1e-10)
    assert count(ranks[5])["query_key"] == 0


def test_the_gauge_is_fixed_within_the_rank_that_is_left():
    view, x = random_view(), torch.randn(1, 9, 20, dtype=torch.float64)
    after = Truncate(4).layer(view)
    fixed = GaugeFix().layer(after)
    assert count(after)["query_key"] == 2 * 16
    assert fixed.k.rows.shape == (2, 4) and fixed.k.bias is None
    for group in range(2):
        assert torch.equal(fixed.k.weight[group, fixed.k.rows[group], :4], torch.eye(4, dtype=torch.float64))
    assert fixed.k.weight[..., 4:].count_nonzero() == 0
    assert (fixed.attend(x) - after.attend(x)).norm() < 1e-12 * after.attend(x).norm()
    ragged = Truncate([[4, 2]]).layer(view)
    assert count(ragged)["query_key"] == 0 and GaugeFix().layer(ragged).k.rows is None
    with pytest.raises(ValueError, match="truncate first, then fix it"):
        Truncate(2).layer(fixed)


def test_bad_ranks():
    view = random_view()
    for ranks, message in (
        (0, "1 to 6"),
        (7, "1 to 6"),
        ([[2]], "expected 2 ranks for layer 0"),
        ([], "2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            Truncate(ranks).layer(view)
    with pytest.raises(ValueError, match="2 ranks for layer 1"):
        Truncate([[2, 2]]).layer(replace(view, layer=1))
    assert low_rank(view) == {}


def rounded(x, dtype):
    return x.to(dtype).double()


def test_the_norm_of_rounding_worked_by_hand():
    """Ones have an ulp of 2⁻⁷ in bfloat16: 2⁻⁷/√12 (√m + √n); a column of 64s outweighs the rest 64 times."""
    ones = torch.ones(1, 9, 4, dtype=torch.float64)
    assert rounding_norm(ones, torch.bfloat16).item() == pytest.approx(5 * 2**-7 / 12**0.5)
    assert rounding_norm(ones, torch.float16).item() == pytest.approx(5 * 2**-10 / 12**0.5)
    assert rounding_norm(ones, torch.float32).item() == pytest.approx(5 * 2**-23 / 12**0.5)
    column = ones.clone()
    column[..., 2] = 64.0
    row = (3 + 64**2) ** 0.5
    assert rounding_norm(column, torch.bfloat16).item() == pytest.approx((3 * 64 + row) * 2**-7 / 12**0.5)
    tiny = torch.full((1, 9, 4), 1e-6, dtype=torch.float64)  # float16 counts in steps of 2⁻²⁴ there
    assert rounding_norm(tiny, torch.float16).item() == pytest.approx(5 * 2**-24 / 12**0.5)
    assert rounding_norm(0 * ones, torch.bfloat16).item() == 0
    stacked = ones.unflatten(1, (3, 3))[None].squeeze(1)
    assert rounding_norm(stacked, torch.bfloat16).item() == pytest.approx(5 * 2**-7 / 12**0.5)
    twice = 2 * torch.eye(9, dtype=torch.float64)
    assert rounding_norm(ones, torch.bfloat16, twice).item() == pytest.approx(10 * 2**-7 / 12**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_of_rounding_is_that_of_true_rounding(dtype):
    """It covers the errors really made, by less than half again; and so does the formula for entries of like size."""
    for size in ((576, 64), (64, 64), (384, 32)):
        weight = 0.02 * torch.randn(1, *size, dtype=torch.float64)
        true = torch.linalg.matrix_norm(rounded(weight, dtype) - weight, 2)
        assert true < rounding_norm(rounded(weight, dtype), dtype) < 1.5 * true
        m, n = size
        formula = torch.finfo(dtype).eps / 4 * (m**0.5 + n**0.5) * weight.norm() / (m * n) ** 0.5
        assert 0.9 * formula < rounding_norm(weight, dtype) < 1.2 * formula
        heavy = weight * torch.randn(1, m, 1, dtype=torch.float64).exp()
        true = torch.linalg.matrix_norm(rounded(heavy, dtype) - heavy, 2)
        assert true < rounding_norm(rounded(heavy, dtype), dtype) < 3 * true


def low_rank_view(rank, of_q, of_k, inputs=192, width=32):
    """Four query and two key heads; the queries have ``rank``, the keys full rank, before they are rounded."""
    turn = torch.linalg.qr(torch.randn(4, width, width, dtype=torch.float64)).Q[:, :rank]
    q = torch.randn(4, inputs, rank, dtype=torch.float64) @ turn
    k = torch.randn(2, inputs, width, dtype=torch.float64)
    view = random_view(inputs=inputs, width=width, biases=False)
    q = Projection(rounded(0.02 * q, of_q), dtype=of_q)
    return replace(view, q=q, k=Projection(rounded(0.02 * k, of_k), dtype=of_k))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("of_q", DTYPES)
@pytest.mark.parametrize("of_k", DTYPES)
def test_the_rank_of_a_head_is_that_before_it_was_rounded(of_q, of_k):
    for rank in (1, 3, 8, 20, 32):
        view = low_rank_view(rank, of_q, of_k)
        assert head_ranks(view) == [rank] * 4
        # Two query heads share a key: their stack has twice the rank.
        assert spectrum(view).needed(1.0) == [min(2 * rank, 32)] * 2
    dead = replace(
        view, q=replace(view.q, weight=view.q.weight * torch.tensor([0.0, 1, 1, 1])[:, None, None])
    )
    assert head_ranks(dead) == [0, 32, 32, 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_energy_that_only_rounding_made_asks_for_no_channel(dtype):
    """Seen by activations too, whose longest directions are a thousand times the shortest."""
    view = low_rank_view(5, dtype, dtype)
    x = torch.randn(400, 192, dtype=torch.float64) * torch.logspace(0, -3, 192, dtype=torch.float64)
    assert spectrum(view, moments(x)).needed(1.0) == [10, 10]
    exact = replace(view, q=replace(view.q, dtype=torch.float64), k=replace(view.k, dtype=torch.float64))
    assert spectrum(exact).needed(1.0) == [32, 32]  # what is stored in float64 is taken at its word
