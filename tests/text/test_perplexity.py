"""Perplexity: of forecasts that are known, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk  # noqa: E402
from gaugekit.hf import loading  # noqa: E402
from gaugekit.text.batches import windows  # noqa: E402
from gaugekit.text.perplexity import log_probabilities  # noqa: E402
from gaugekit.verbs.perplexity import _Sums, compare_perplexity  # noqa: E402
from sliceable import WORDS, build, save  # noqa: E402
from tiny import copy_of  # noqa: E402


class Forecast(nn.Module):
    """Holds every token of 8 likely by ``logits``, whatever came before."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.config = SimpleNamespace(max_position_embeddings=64, to_dict=dict)

    def forward(self, input_ids, use_cache=True):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def digits(text, **_):
    return {"input_ids": [int(letter) for letter in text]}


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path):
    (tmp_path / "text.txt").write_text("0123456701234567")
    assert gk.perplexity(Forecast([0.0] * 8), tmp_path / "text.txt", tokenizer=digits) == pytest.approx(8)


def test_the_first_token_of_a_window_is_not_foretold(tmp_path):
    (tmp_path / "text.txt").write_text("0001" + "1110" + "00")  # two windows of 4, the rest is left out
    logits = [math.log(3), 0.0] + [-1e30] * 6  # p(0) = 3/4, p(1) = 1/4
    expected = math.exp(-(2 * math.log(0.75) + math.log(0.25) + 2 * math.log(0.25) + math.log(0.75)) / 6)
    got = gk.perplexity(Forecast(logits), tmp_path / "text.txt", tokenizer=digits, window=4)
    assert got == pytest.approx(expected, rel=1e-6)
    first = gk.perplexity(Forecast(logits), tmp_path / "text.txt", tokenizer=digits, window=4, most=1)
    assert first == pytest.approx(math.exp(-(2 * math.log(0.75) + math.log(0.25)) / 3), rel=1e-6)


def test_windows_of_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("01234567")
    assert windows(digits, tmp_path / "text.txt", 3) == [[0, 1, 2], [3, 4, 5]]
    assert windows(digits, tmp_path / "text.txt", 3, 1) == [[0, 1, 2]]
    assert windows(digits, tmp_path / "text.txt", 20) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    (tmp_path / "text.txt").write_text("0")
    with pytest.raises(ValueError, match="text: expected text of two tokens at least, got 1"):
        windows(digits, tmp_path / "text.txt", 3)
    with pytest.raises(ValueError, match="text: expected a UTF-8 text file"):
        windows(digits, tmp_path / "none.txt", 3)


def test_a_model_without_logits_is_refused():
    class Encoder(Forecast):
        def forward(self, input_ids, use_cache=True):
            return SimpleNamespace(last_hidden_state=0)

    with pytest.raises(ValueError, match="expected a causal language model"):
        log_probabilities(Encoder([0.0]), [1, 2])


def test_two_models_are_held_side_by_side(tmp_path):
    source, text = save("llama", tmp_path)
    model = loading.model(source, torch.float64)
    same = compare_perplexity(source, model, text, window=32, most=2)
    assert same["divergence"] == pytest.approx(0, abs=1e-12) and same["agreement"] == 1.0
    assert (
        same["perplexity_a"] == same["perplexity_b"] and same["tokens"] == 62 and same["dtype"] == "float64"
    )
    other = copy_of(model, 0.2).double()
    report = compare_perplexity(source, other, text, window=32, most=2)
    tokens = loading.tokenizer(source)(text.read_text())["input_ids"]
    losses, divergences = [], []
    with torch.no_grad():
        for start in (0, 32):
            window = torch.tensor([tokens[start : start + 32]])
            losses.append(float(other(window, labels=window).loss))
            p, q = (m(window).logits[0, :-1].log_softmax(-1) for m in (model, other))
            divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert report["perplexity_b"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-6)
    assert report["divergence"] == pytest.approx(sum(divergences) / 2, rel=1e-6)
    assert 0 < report["agreement"] < 1 and report["perplexity_a"] != report["perplexity_b"]
    assert gk.perplexity(model, text, window=32, most=2) == pytest.approx(report["perplexity_a"])


def test_what_is_not_finite_is_said_to_be(tmp_path):
    source, text = save("llama", tmp_path)
    options = dict(window=8, most=2)
    broken = loading.model(source, torch.float64)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    report = compare_perplexity(source, broken, text, **options)
    assert report["perplexity_b"] is report["divergence"] is report["agreement"] is None
    assert report["perplexity_a"] > 1 and str(report).count("not finite") == 3
    tokenizer = loading.tokenizer(source)
    assert math.isnan(gk.perplexity(broken, text, tokenizer=tokenizer, **options))
    with torch.no_grad():
        broken.lm_head.weight.nan_to_num_().mul_(1e5)
    assert gk.perplexity(broken, text, tokenizer=tokenizer, **options) == math.inf
    assert compare_perplexity(source, broken, text, **options)["perplexity_b"] is None


def test_tokens_that_both_models_rule_out_do_not_count():
    sums = _Sums()
    p = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    sums.add([0, 0], p, p)
    assert sums.fields()["divergence"] == 0.0 and sums.fields()["agreement"] == 1.0
    sums.add([0, 0], torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), p)
    assert sums.fields()["divergence"] is None  # infinite: the second rules out what the first does not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window: expected a whole number of at least 2, got 1"),
        ({"window": -3}, "window: expected a whole number of at least 2, got -3"),
        ({"window": "8"}, "window: expected a whole number of at least 2, got '8'"),
        ({"most": 0}, "most: expected a whole number of at least 1, got 0"),
    ],
)
def test_windows_that_are_none_are_named(tmp_path, options, message):
    source, text = save("llama", tmp_path)
    with pytest.raises(ValueError, match=message):
        compare_perplexity(source, source, text, **options)
    with pytest.raises(ValueError, match=message):
        gk.perplexity(loading.model(source, torch.float32), text, **options)


def test_the_model_of_fewer_positions_sets_the_window(tmp_path):
    source, text = save("gpt2", tmp_path)
    assert compare_perplexity(source, build("gpt2", n_positions=4), text, most=2)["window"] == 4
    source, text = save("gpt2", tmp_path, n_positions=1)
    with pytest.raises(ValueError, match="model: expected two positions at least, got 1"):
        compare_perplexity(source, source, text)


def test_models_of_other_vocabularies_are_refused(tmp_path):
    source, text = save("llama", tmp_path)
    tokenizer = loading.tokenizer(source)
    with pytest.raises(ValueError, match="text: expected tokens of the model's vocabulary of 10, got token"):
        gk.perplexity(build("llama", vocab_size=10), text, tokenizer=tokenizer, window=8, most=1)
    with pytest.raises(ValueError, match="b: expected logits"):
        compare_perplexity(source, build("llama", vocab_size=50), text, window=8, most=1)
    assert len(WORDS) > 60
