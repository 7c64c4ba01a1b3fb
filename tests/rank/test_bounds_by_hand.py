"""The bound's constants by hand: every factor of the derivation, and how a layer moves when its tokens grow."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from gaugekit import rank
from tiny import bert

# ∫₀¹ √log(9/u) du = √log 9 + (√π/2) · 9 · erfc(√log 9) = 1.482304 + 0.287585
INTEGRAL = 1.769889
SAMPLES, DELTA = 25, math.exp(-2)  # √n = 5; √(log(1/δ) / 2n) = √(2 / 50) = 0.2


def diagonal(numbers, rows, columns):
    """[rows, columns] with ``numbers`` as its singular values."""
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    matrix.diagonal()[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return matrix


SCORES = diagonal([1, 1, 3, 5], 4, 4)  # ‖W‖_F = √(1 + 1 + 9 + 25) = 6, r = 4: √(r (2D + 1)) = √(4 · 9) = 6
VALUE = diagonal([2, 2, 1], 4, 9)  # ‖W_V‖ = 2, ‖W_V‖_F = √(4 + 4 + 1) = 3, √(D V) = √36 = 6, √V = 3
READOUT = torch.tensor([3, 0, 0, 4, 0, 0, 0, 0, 0], dtype=torch.float64)  # ‖w‖ = 5


def test_every_factor_by_hand():
    limits = rank.covering_bound(
        SCORES, VALUE, READOUT, SAMPLES, input_norm=2, scale=3, lipschitz=7, loss_lipschitz=11, loss_range=13,
        delta=DELTA,
    )  # fmt: skip
    # L_W F_W √(r (2D + 1)) = (2 · s · ‖w‖ · L_σ · ‖W_V‖ · B_x³) · 6 · 6
    scores = (2 * 3 * 5 * 7 * 2 * 2**3) * 6 * 6
    # L_V F_V √(D V) = (‖w‖ · L_σ · B_x) · 3 · 6;  L_w F_w √V = (L_σ · ‖W_V‖_F · B_x) · 5 · 3
    values, readout = (5 * 7 * 2) * 3 * 6, (7 * 3 * 2) * 5 * 3
    assert (scores, values, readout) == (120_960, 1_260, 630)
    # Three parts with a third of the accuracy each, times Dudley's 12: 36 · 1.769889 / 5
    dudley = 36 * INTEGRAL / 5
    assert limits["rank"] == 4
    assert limits["rademacher"] == pytest.approx(dudley * 122_850, rel=1e-6)
    # gap = 2 L_ℓ Rad + b √(log(1/δ) / 2n) = 2 · 11 · Rad + 13 · 0.2
    assert limits["scores"] == pytest.approx(22 * dudley * 120_960, rel=1e-6)
    assert limits["values"] == pytest.approx(22 * dudley * 1_260, rel=1e-6)
    assert limits["readout"] == pytest.approx(22 * dudley * 630, rel=1e-6)
    assert limits["chance"] == pytest.approx(2.6, rel=1e-12)
    assert limits["gap"] == pytest.approx(22 * dudley * 122_850 + 2.6, rel=1e-6)


def test_what_is_left_out_is_one_in_twenty_and_factors_of_one():
    limits = rank.covering_bound(SCORES, VALUE, READOUT, SAMPLES, input_norm=1)
    assert limits["scores"] == pytest.approx(2 * 36 * INTEGRAL / 5 * (2 * 5 * 2) * 6 * 6, rel=1e-6)
    assert limits["chance"] == pytest.approx(math.sqrt(math.log(20) / 50), rel=1e-12)  # δ = 0.05
    once = rank.covering_bound(SCORES, VALUE, READOUT, 1, input_norm=1)
    assert once["gap"] == pytest.approx(5 * limits["gap"], rel=1e-12)  # all of it falls with 1/√n


def test_a_layer_moves_with_the_cube_of_its_tokens_norm():
    """At W = 0 the softmax is uniform, so a step of W moves f(cX) by c³ what it moves f(X), a step of W_V by c; one of
    c³ there is what L_W has to pay for, and the layer's scale moves it as much as it says.
    """
    torch.manual_seed(0)
    x, step = (torch.randn(9, 4, dtype=torch.float64) for _ in range(2))
    step, value, readout = step[:4], torch.randn(4, 9, dtype=torch.float64), READOUT

    def moved(c, s=1.0):
        scores = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
        tokens = c * x
        out = readout @ (value.mT @ (tokens.mT @ (s * tokens @ scores @ tokens[0]).softmax(0)))
        return (torch.autograd.grad(out, scores)[0] * step).sum()

    def parts(c, s=1.0):
        return rank.covering_bound(SCORES, value, readout, SAMPLES, input_norm=c, scale=s)

    assert abs(moved(1)) > 1e-3
    for c in (2, 3):
        assert parts(c)["scores"] / parts(1)["scores"] == pytest.approx((moved(c) / moved(1)).item())
        assert parts(c)["values"] / parts(1)["values"] == pytest.approx(c)
        assert parts(c)["readout"] / parts(1)["readout"] == pytest.approx(c)
    assert parts(1, 5.0)["scores"] / parts(1)["scores"] == pytest.approx((moved(1, 5.0) / moved(1)).item())
    assert parts(1, 5.0)["values"] == parts(1)["values"]


def test_a_model_of_one_head_by_hand():
    """Width 4 in one head: scores are scaled by 1/√4 and a normalised token has norm √4."""
    model = bert(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4)
    attention = model.encoder.layer[0].attention
    with torch.no_grad():
        attention.self.query.weight.copy_(torch.eye(4))
        attention.self.key.weight.copy_(SCORES)
        attention.self.value.weight.copy_(VALUE[:, :4])
        attention.output.dense.weight.copy_(torch.eye(4))
    report = rank.bound(model, SAMPLES, delta=DELTA)
    assert len(report["layers"]) == 1
    layer = report["layers"][0]
    assert (report["n_samples"], report["delta"], layer["layer"]) == (25, DELTA, 0)
    assert layer["ranks"] == [4] and layer["log_rank_sum"] == pytest.approx(math.log(4))
    assert layer["spectral_norms"] == pytest.approx([5]) and layer["stable_ranks"] == pytest.approx([36 / 25])
    # ‖w‖ = L_σ = L_ℓ = b = 1, D = V = 4: (2 · ½ · 2 · 2³) · 6 · 6 + (2 · 3) · √16 + (3 · 2) · √4
    steps = (2 * 0.5 * 2 * 2**3) * 6 * 6 + (2 * 3) * 4 + (3 * 2) * 2
    assert steps == 612
    assert layer["bounds"] == pytest.approx([2 * 36 * INTEGRAL / 5 * steps + 0.2], rel=1e-6)
    # tokens of norm 1: (2 · ½ · 2 · 1) · 6 · 6 + (1 · 3) · √16 + (3 · 1) · √4
    other = rank.bound(model, SAMPLES, input_norm=1.0, delta=DELTA)["layers"][0]
    assert other["bounds"] == pytest.approx([2 * 36 * INTEGRAL / 5 * (72 + 12 + 6) + 0.2], rel=1e-6)


def test_heads_read_the_keys_of_their_own_group():
    """Four heads over two groups of keys: the first two are held against the first group, the last two the second."""
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=8,
        vocab_size=9,
    )  # fmt: skip
    model = LlamaModel(config)
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.copy_(torch.eye(4).repeat(4, 4))
        attention.k_proj.weight.copy_(torch.cat([3 * torch.eye(4), 7 * torch.eye(4)]).repeat(1, 4))
        attention.v_proj.weight.copy_(torch.cat([torch.eye(4, 16), 5 * torch.eye(4, 16)]))
        attention.o_proj.weight.copy_(torch.eye(16))
    # Q_h K_gᵀ is [16, 16] of 4 × 4 blocks c · I: its norm is c times that of the all-ones [4, 4], 4.
    report = rank.bound(model, SAMPLES)
    assert report["delta"] == 0.05
    (layer,) = report["layers"]
    assert layer["spectral_norms"] == pytest.approx([12, 12, 28, 28])
    # It has that norm four times: ‖W‖_F = 8 c, r = 4, √(r (2D + 1)) = 2 √33. Values through W_O are v times four unit
    # vectors: ‖W_V‖ = v, ‖W_V‖_F = 2 v. With s = 1/√4 and B_x = √16 the parts are (2 · ½ · v · 4³) · 8 c · 2 √33,
    # 4 · 2 v · √(16 · 16) and 2 v · 4 · √16; δ is one in twenty.
    for head, (c, v) in enumerate([(3, 1), (3, 1), (7, 5), (7, 5)]):
        steps = 64 * v * 8 * c * 2 * math.sqrt(33) + 128 * v + 32 * v
        expected = 2 * 36 * INTEGRAL / 5 * steps + math.sqrt(math.log(20) / 50)
        assert layer["bounds"][head] == pytest.approx(expected, rel=1e-6)


def test_a_module_without_keys_is_no_pair_of_factors():
    module = torch.nn.Module()
    module.query = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="found none"):
        rank.nuclear_penalty(module)
