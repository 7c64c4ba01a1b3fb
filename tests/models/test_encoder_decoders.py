"""Whisper, BART and its kin, T5: self-attention on both sides, and cross-attention with groups of its own."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import kin as checks  # noqa: E402
from gaugekit.models import Live, family  # noqa: E402
from gaugekit.verbs.perplexity import compare_perplexity  # noqa: E402
from kin import ALL, Kin  # noqa: E402

TOKENS = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
BART = dict(
    TOKENS, d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=20, forced_eos_token_id=None, dropout=0.0,
)  # fmt: skip
SMALL = dict(BART, decoder_layers=1)
WHISPER = dict(
    BART, num_mel_bins=8, max_source_positions=10, max_target_positions=20, begin_suppress_tokens=None,
    suppress_tokens=None,
)  # fmt: skip
T5 = dict(TOKENS, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
BARE = {"value_output": 64, "query_key": 64}
NO_KEY_BIAS = {name: size for name, size in ALL.items() if name != "key_bias"}

KIN = {
    "whisper": Kin("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, [NO_KEY_BIAS] * 5),
    "whisper's encoder": Kin("WhisperForAudioClassification", "WhisperConfig", WHISPER, [NO_KEY_BIAS]),
    "bart": Kin("BartForConditionalGeneration", "BartConfig", BART, [ALL] * 5),
    "mbart": Kin("MBartForConditionalGeneration", "MBartConfig", SMALL, [ALL] * 3),
    "pegasus": Kin("PegasusForConditionalGeneration", "PegasusConfig", SMALL, [ALL] * 3),
    "marian": Kin("MarianMTModel", "MarianConfig", SMALL, [ALL] * 3),
    "blenderbot": Kin("BlenderbotForConditionalGeneration", "BlenderbotConfig", SMALL, [ALL] * 3),
    "blenderbot-small": Kin(
        "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", SMALL, [ALL] * 3
    ),
    "m2m_100": Kin("M2M100ForConditionalGeneration", "M2M100Config", SMALL, [ALL] * 3),
    "plbart": Kin("PLBartForConditionalGeneration", "PLBartConfig", SMALL, [ALL] * 3),
    "t5": Kin("T5ForConditionalGeneration", "T5Config", T5, [BARE] * 6, None),
    "t5's encoder": Kin("T5EncoderModel", "T5Config", T5, [BARE] * 2, None),
    "mt5": Kin("MT5ForConditionalGeneration", "MT5Config", dict(T5, num_layers=1), [BARE] * 3, None),
    "umt5": Kin("UMT5ForConditionalGeneration", "UMT5Config", dict(T5, num_layers=1), [BARE] * 3, None),
}


class TestFamilies(checks.Families):
    pass


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_heads_are_turned_until_rows_are_triangular(name):
    checks.check_turned(KIN[name].case, KIN[name].counts)


def test_turned_heads_are_stored_without_their_zeros(tmp_path):
    checks.check_turned_files(KIN["t5"].case, KIN["t5"].counts, tmp_path)


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        (
            "whisper",
            12 * 6 * (2 * 64**2 + 64),
        ),  # tiny: 4 layers that encode, 4 that decode with two attentions each
        ("bart", 36 * 16 * (2 * 64**2 + 2 * 64)),  # large
        ("t5", 18 * 8 * 2 * 64**2),  # small
        ("clip", 12 * (8 + 12) * (2 * 64**2 + 2 * 64)),  # ViT-B/32
        ("albert", 64 * (2 * 64**2 + 2 * 64)),  # xxlarge, 12 layers of one set of weights
        ("modernbert", 22 * 12 * 64**2),  # base
    ],
)
def test_counts_of_published_shapes_from_the_config_alone(kind, total):
    config = transformers.AutoConfig.for_model(kind).to_dict()
    assert gk.symmetry.GaugeFix().plan(config)["total"] == total


def test_a_decoder_s_block_holds_two_layers():
    model = KIN["bart"].model()
    live = Live(model)
    blocks = [live.family.block(layer) for layer in range(5)]
    assert blocks == ["encoder.layers.0", *["decoder.layers.0"] * 2, *["decoder.layers.1"] * 2]
    views = [live.attention(layer) for layer in range(5)]
    assert [view.cross for view in views] == [False, False, True, False, True]
    assert [view.causal for view in views] == [False, True, False, True, False]
    rows = gk.inspect(model)["layers"]
    assert rows[1]["exponent_entropy_bits"] == rows[2]["exponent_entropy_bits"]


@pytest.mark.parametrize(("kind", "tables"), [("t5", 2 + 2), ("mt5", 2 + 2), ("umt5", 6)])
def test_heads_that_share_a_bias_change_places_in_all_layers_at_once(kind, tables):
    """One table for the encoder, one for the decoder, none in cross-attention; UMT5 has one for each layer. Beside
    them, the hidden units of four MLPs."""
    bits = tables * math.log2(math.factorial(3)) + 4 * math.log2(math.factorial(32))
    assert gk.inspect({"model_type": kind, **T5})["permutation_bits"] == pytest.approx(bits, rel=1e-12)
    if kind == "t5":
        assert gk.inspect(KIN["t5"].model())["permutation_bits"] == pytest.approx(bits, rel=1e-12)


def test_heads_of_one_layer_alone_cannot_change_places_under_a_shared_bias():
    model = KIN["t5's encoder"].model()
    order = [1, 0, 2]
    ids = torch.arange(3, 11)[None]

    def permute(layer):
        attention = model.encoder.block[layer].layer[0].SelfAttention
        for part in (attention.q, attention.k, attention.v):
            part.weight.copy_(part.weight.unflatten(0, (3, -1))[order].flatten(0, 1))
        attention.o.weight.copy_(attention.o.weight.unflatten(1, (3, -1))[:, order].flatten(1))

    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        permute(1)
        assert (model(input_ids=ids).last_hidden_state - before).norm() > 1e-3 * before.norm()
        permute(0)
        table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        table.weight.copy_(table.weight[:, order])
        assert (model(input_ids=ids).last_hidden_state - before).norm() < 1e-12 * before.norm()


def test_cross_attention_reads_two_sequences():
    cross = Live(KIN["t5"].model()).attention(3)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"memory: expected \[B, S, D\] in this layer, got None"):
        cross.attend(x)
    with pytest.raises(ValueError, match="memory: expected None in this layer, got a tensor"):
        Live(KIN["t5"].model()).attention(2).attend(x, x)
    assert cross.attend(x, torch.randn(1, 7, 24, dtype=torch.float64)).shape == (1, 4, 24)


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_verify_sees_a_change_on_either_side(name):
    model = KIN[name].model(torch.float32)
    live, report = Live(model), gk.verify(model, model)
    assert report["ok"] and report["relative_error"] == report["noise"]
    for layer in (0, len(live) - 2, len(live) - 1):
        other = KIN[name].model(torch.float32)
        with torch.no_grad():
            other.get_submodule(live.prefix + live.family.projections(layer)["v"]).weight.mul_(1.001)
        changed = gk.verify(model, other)
        assert not changed["ok"] and changed["output"] == "logits"
        blocks = len({live.family.block(layer) for layer in range(len(live))})
        assert (
            len(changed["layers"]) == blocks + 2
        )  # a hidden state before each side, and one after each block


def test_what_follows_one_text_refuses_an_encoder_and_a_decoder(tmp_path):
    from tiny import add_tokenizer

    reason = "its encoder and its decoder read sequences of their own"
    KIN["bart"].model(torch.float32).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert f"token_cosine: not computed, since {reason}" in gk.inspect(tmp_path).notes
    with pytest.raises(ValueError, match=f"checkpoint: expected blocks .* but {reason}"):
        gk.statistics.collect(tmp_path, ["abc"])
    with pytest.raises(ValueError, match=f"model: expected one that reads one text, but {reason}"):
        gk.statistics.observe(model, ["abc"])
    with pytest.raises(ValueError, match=f"teacher: expected a model that reads one text, but {reason}"):
        gk.heal(model, model, ["abc", "def"] * 20, steps=1)
    with pytest.raises(ValueError, match="pool: expected None"):
        gk.verify(model, model, pool="mean")
    with pytest.raises(ValueError, match="a: expected a decoder, got an encoder-decoder model"):
        compare_perplexity(model, model, "abc")
    assert gk.verify(tmp_path, tmp_path)["ok"]


def test_a_first_block_that_hands_positions_on_is_not_streamed():
    for kind, streamed in (("t5", False), ("umt5", True)):
        sizes = {"d_model": 24, "d_kv": 8, "num_layers": 1, "num_heads": 3, "is_encoder_decoder": False}
        assert (family({"model_type": kind, **sizes}).unstreamed is None) is streamed


def test_sizes_that_do_not_fit_are_refused():
    sizes = dict(BART, d_model=25)
    with pytest.raises(ValueError, match="d_model: expected a multiple of encoder_attention_heads=3, got 25"):
        family({"model_type": "bart", **sizes})
    with pytest.raises(ValueError, match="decoder_attention_heads=5, got 24"):
        family({"model_type": "bart", **BART, "decoder_attention_heads": 5})
