"""The bound: no T in it, 1/√n, √r; its Lipschitz constants hold; the penalty is the nuclear norm at its least."""

import math

import pytest
import torch

from gaugekit import rank
from gaugekit.nn import LowRankAttention
from gaugekit.rank.bounds import INTEGRAL
from tiny import bert

D, V = 12, 5


def layer(seed=0):
    torch.manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64) for shape in ((D, D), (D, V), (V,)))


def f(x, scores, value, readout, s=1.0):
    return readout @ torch.tanh(value.mT @ (x.mT @ (s * x @ scores @ x[0]).softmax(0)))


def test_the_integral_is_what_it_says():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert pytest.approx(torch.log(9 / u).sqrt().mean().item(), rel=1e-6) == INTEGRAL
    assert round(INTEGRAL, 3) == 1.770


def test_falls_with_the_samples_and_grows_with_the_rank():
    scores, value, readout = layer()
    at = {n: rank.covering_bound(scores, value, readout, n, input_norm=1.0) for n in (100, 400)}
    assert at[100]["gap"] == pytest.approx(2 * at[400]["gap"], rel=1e-12)
    ranks = [rank.covering_bound(scores, value, readout, 100, input_norm=1.0, rank=r) for r in (1, 2, 4, 9)]
    for r, found in zip((1, 2, 4, 9), ranks, strict=True):
        assert found["scores"] == pytest.approx(math.sqrt(r) * ranks[0]["scores"], rel=1e-12)
        assert found["values"] == ranks[0]["values"] and found["chance"] == ranks[0]["chance"]
        assert found["gap"] == pytest.approx(sum(found[p] for p in ("scores", "values", "readout", "chance")))
    low = torch.randn(D, 3, dtype=torch.float64) @ torch.randn(3, D, dtype=torch.float64)
    assert rank.covering_bound(low, value, readout, 100, input_norm=1.0)["rank"] == 3


@pytest.mark.parametrize("length", [1, 7, 300])
def test_the_lipschitz_constant_holds_at_every_length(length):
    """The bound names no T; so neither may the constant it rests on."""
    scores, value, readout = layer()
    x = torch.nn.functional.normalize(torch.randn(length, D, dtype=torch.float64), dim=-1)
    for _ in range(20):
        step = 0.3 * torch.randn(D, D, dtype=torch.float64)
        moved = abs(f(x, scores + step, value, readout) - f(x, scores, value, readout))
        spectral = torch.linalg.matrix_norm(value, 2)
        assert moved <= 2 * readout.norm() * spectral * torch.linalg.matrix_norm(step, 2)


def test_a_model_by_layer_and_head():
    model = bert()
    report = rank.bound(model, 1000)
    assert [len(row["bounds"]) for row in report["layers"]] == [4, 4]
    row = report["layers"][0]
    assert row["ranks"] == [8] * 4 and row["log_rank_sum"] == pytest.approx(4 * math.log(8))
    assert all(1 <= stable <= 8 for stable in row["stable_ranks"])
    rank.truncate(model, rank=2)
    after = rank.bound(model, 1000)["layers"][0]
    assert after["ranks"] == [2] * 4 and all(
        a < b for a, b in zip(after["bounds"], row["bounds"], strict=True)
    )


def test_nuclear_penalty():
    product = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 9, dtype=torch.float64)
    u, values, v = torch.linalg.svd(product)
    balanced = u * values.sqrt(), v.mT * values.sqrt()
    assert rank.nuclear_penalty(balanced).item() == pytest.approx(values.sum().item())
    assert rank.nuclear_penalty((u * values, v.mT)) > rank.nuclear_penalty(balanced)
    module = LowRankAttention(16, 4, 2)
    rank.nuclear_penalty(module).backward()
    torch.testing.assert_close(module.query.weight.grad, module.query.weight.detach())
    with pytest.raises(ValueError, match="found none"):
        rank.nuclear_penalty(torch.nn.Linear(2, 2))


def test_bad_arguments():
    scores, value, readout = layer()
    for changes, message in (({"n_samples": 0}, "n_samples"), ({"delta": 1.0}, "delta")):
        with pytest.raises(ValueError, match=message):
            rank.covering_bound(scores, value, readout, **{"n_samples": 5, "input_norm": 1.0, **changes})
    with pytest.raises(ValueError, match="scores, readout"):
        rank.covering_bound(scores, value, readout[:2], 5, input_norm=1.0)
