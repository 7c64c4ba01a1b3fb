"""The gauge for quantisation: exact, balanced, and with less to lose when it is rounded to four bits."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit.models import Live  # noqa: E402
from gaugekit.symmetry import QuantizationGauge  # noqa: E402
from gaugekit.symmetry.gauge import balance, rotation  # noqa: E402


def factors(seed=0, inputs=40, width=6, outputs=50):
    """Two factors out of balance, the entries of one channel far above the others'."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(2, *shape, dtype=torch.float64, generator=generator)
        for shape in ((inputs, width), (width, outputs))
    )
    scales = torch.logspace(0, 2, width, dtype=torch.float64)
    return left * scales, right


def rounded(weight, bits=4, group=10):
    """Round to nearest, a scale for each ``group`` inputs of an output: what most tools do."""
    parts = weight.mT.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((parts - low) / step).round() * step + low).flatten(-2).mT


def loss(left, right):
    product = left @ right
    return float((rounded(left) @ right - product).norm() / product.norm())


def test_balanced_factors_have_one_diagonal_gram_matrix_and_the_least_norms():
    left, right = factors()
    element = balance(left, right)
    one, other = left @ element, torch.linalg.solve(element, right)
    spectrum = torch.linalg.svdvals(left @ right)[:, :6]
    torch.testing.assert_close(
        one.mT @ one, torch.diag_embed(spectrum), rtol=1e-9, atol=1e-9 * float(spectrum.max())
    )
    torch.testing.assert_close(other @ other.mT, one.mT @ one, rtol=1e-9, atol=1e-9 * float(spectrum.max()))
    torch.testing.assert_close(one @ other, left @ right, rtol=1e-10, atol=1e-10 * float(spectrum.max()))
    norms = one.square().sum((1, 2)) + other.square().sum((1, 2))
    torch.testing.assert_close(norms, 2 * spectrum.sum(1))


def test_a_head_of_lower_rank_is_not_balanced():
    left, right = factors()
    left[0, :, 1] = left[0, :, 0]
    element = balance(left, right)
    assert torch.equal(element[0], torch.eye(6, dtype=torch.float64))
    assert not torch.equal(element[1], torch.eye(6, dtype=torch.float64))


def test_the_rotation_lowers_fourth_powers_and_is_the_same_every_time():
    left, right = factors()
    turn = rotation(left, right)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(6, dtype=torch.float64).expand(2, -1, -1))
    assert torch.equal(turn, rotation(left, right)) and not turn.requires_grad

    def spread(one, other):
        return sum(part.pow(4).mean((1, 2)) / part.square().mean((1, 2)) ** 2 for part in (one, other))

    assert (spread(left @ turn, turn.mT @ right) < 0.5 * spread(left, right)).all()


@pytest.mark.parametrize("balanced", [True, False])
def test_no_output_moves(balanced):
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    tokens = torch.randint(40, (2, 9))
    expected, live = model(tokens).logits.detach(), Live(model)
    for layer in range(2):
        view = live.attention(layer)
        moved = QuantizationGauge(balanced).layer(view)
        for part in "qkvo":
            assert not torch.equal(getattr(view, part).weight, getattr(moved, part).weight)
        live.write(live.family.store(layer, moved).tensors)
    assert (model(tokens).logits - expected).norm() <= 1e-12 * expected.norm()


def test_rounding_to_four_bits_loses_less_than_after_a_rotation_alone():
    left, right = factors(width=8)
    turn = rotation(left, right)
    element = balance(left, right)
    element = element @ rotation(left @ element, torch.linalg.solve(element, right))
    plain, turned, moved = (
        loss(left @ part, torch.linalg.solve(part, right))
        for part in (torch.eye(8, dtype=torch.float64).expand(2, -1, -1), turn, element)
    )
    assert moved < turned and moved < plain


def test_queries_and_keys_stay_under_rotary_positions():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        intermediate_size=32,
    )  # fmt: skip
    view = Live(transformers.LlamaForCausalLM(config).double()).attention(0)
    moved = QuantizationGauge().layer(view)
    assert torch.equal(moved.q.weight, view.q.weight) and torch.equal(moved.k.weight, view.k.weight)
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    assert (moved.attend(x) - view.attend(x)).norm() <= 1e-12 * view.attend(x).norm()
    assert gk.symmetry.SYMMETRIES["value_output"].contains(replace(view), moved)


def test_a_directory_through_convert(tmp_path):
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "plain")
    report = gk.convert(tmp_path / "plain", tmp_path / "moved", [QuantizationGauge()], dense=True)
    assert report["steps"][0]["rewrite"] == "quantization gauge" and report["invariance_error"] < 1e-13
    assert report["parameters_before"] == report["parameters_after"]
    assert gk.verify(tmp_path / "plain", tmp_path / "moved")["ok"]
