"""DistilBERT, ELECTRA, MPNet, DeBERTa, ALBERT, ModernBERT and the towers that read text."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import kin as checks  # noqa: E402
from gaugekit.models import Live, family  # noqa: E402
from kin import ALL, BIASES, TEXT, Kin  # noqa: E402

DISTIL = dict(vocab_size=60, max_position_embeddings=20, dim=24, n_heads=3, n_layers=2, hidden_dim=32)
DEBERTA = dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"])
ALBERT = dict(TEXT, embedding_size=16)
MODERN = dict(TEXT, pad_token_id=0, local_attention=32, layer_types=["full_attention", "sliding_attention"])
TOWER = dict(TEXT, projection_dim=16, projection_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=59)

KIN = {
    "distilbert": Kin("DistilBertForMaskedLM", "DistilBertConfig", DISTIL, [ALL] * 2),
    "electra": Kin("ElectraForPreTraining", "ElectraConfig", dict(TEXT, embedding_size=16), [ALL] * 2),
    "mpnet": Kin("MPNetForMaskedLM", "MPNetConfig", TEXT, [ALL] * 2, None),
    "deberta-v2": Kin("DebertaV2Model", "DebertaV2Config", DEBERTA, [BIASES] * 2, None),
    "deberta-v2 shared": Kin(
        "DebertaV2Model", "DebertaV2Config", dict(DEBERTA, share_att_key=True), [{**BIASES, "query_key": 64}] * 2, None
    ),
    "deberta-v2 c2p": Kin(
        "DebertaV2Model", "DebertaV2Config", {**DEBERTA, "pos_att_type": ["c2p"]}, [{**BIASES, "key_bias": 8}] * 2, None
    ),
    "deberta-v2 without positions": Kin("DebertaV2Model", "DebertaV2Config", TEXT, [ALL] * 2, None, 1e-6),
    "albert": Kin("AlbertForMaskedLM", "AlbertConfig", dict(ALBERT, num_hidden_layers=3), [ALL]),
    "albert in groups": Kin(
        "AlbertModel", "AlbertConfig",
        dict(ALBERT, num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2), [ALL] * 4,
    ),
    "modernbert": Kin("ModernBertForMaskedLM", "ModernBertConfig", MODERN, [{"value_output": 64}] * 2, near=1e-5),
    "modernbert with biases": Kin(
        "ModernBertModel", "ModernBertConfig", dict(MODERN, attention_bias=True), [BIASES] * 2, near=1e-5
    ),
    "clip_text_model": Kin("CLIPTextModel", "CLIPTextConfig", TOWER, [ALL] * 2),
    "clip_text_model projected": Kin("CLIPTextModelWithProjection", "CLIPTextConfig", TOWER, [ALL] * 2),
    "siglip_text_model": Kin("SiglipTextModel", "SiglipTextConfig", TOWER, [ALL] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", KIN)
def test_every_group_that_holds_is_fixed_and_no_output_moves(name):
    checks.check_groups(KIN[name])


@pytest.mark.parametrize("name", KIN)
def test_an_adapter_names_the_tensors_there_are_and_stores_what_it_read(name):
    checks.check_adapter(KIN[name])


@pytest.mark.parametrize("name", sorted(KIN.keys() - {"deberta-v2", "deberta-v2 shared", "deberta-v2 c2p"}))
def test_a_view_computes_what_the_module_computes(name):
    checks.check_view(KIN[name])


@pytest.mark.parametrize("name", KIN)
def test_through_every_verb(name, tmp_path):
    checks.check_verbs(KIN[name], tmp_path)


@pytest.mark.parametrize("name", ["albert", "modernbert with biases", "deberta-v2 shared"])
def test_heads_are_turned_until_rows_are_triangular(name):
    kin = KIN[name]
    checks.check_turned(lambda dtype: (model := kin.model(dtype), checks.inputs_of(model)), kin.counts)


def test_turned_heads_are_stored_without_their_zeros(tmp_path):
    kin = KIN["modernbert with biases"]
    checks.check_turned_files(
        lambda dtype: (model := kin.model(dtype), checks.inputs_of(model)), kin.counts, tmp_path
    )


def test_a_layer_that_albert_runs_again_and_again_counts_once():
    model = KIN["albert"].model()
    assert len(Live(model)) == 1 and len(gk.inspect(model)["layers"]) == 1
    observed = gk.models.family(model.config.to_dict())
    assert not observed.once and observed.unstreamed == "it runs the same block at several depths"


def test_modernbert_finds_its_angles_and_kinds_of_layer_in_old_and_new_configs():
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 4}
    old = {"model_type": "modernbert", **sizes, "global_rope_theta": 500.0, "local_rope_theta": 7.0}
    new = transformers.ModernBertConfig(
        **sizes,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
        },
    ).to_dict()
    for config in (old, new):
        bases = [family(config).outline(layer).rotary_base for layer in range(4)]
        assert bases == [500.0, 7.0, 7.0, 500.0]
    bare = family({"model_type": "modernbert", **sizes})
    assert [bare.outline(layer).rotary_base for layer in range(2)] == [160_000.0, 10_000.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "distilbert", "dim": 25, "n_heads": 3, "n_layers": 1}, "dim: expected a multiple of n_heads=3"),
        (
            {"model_type": "modernbert", "hidden_size": 21, "num_attention_heads": 3, "num_hidden_layers": 1},
            "hidden_size: expected 3 heads of one even width, got 21",
        ),
        (
            {
                "model_type": "modernbert", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1,
                "layer_types": ["linear_attention"],
            },
            "layer_types: expected full_attention or sliding_attention, got 'linear_attention'",
        ),
        ({"model_type": "clip_text_model", "hidden_size": 25}, "hidden_size: expected a multiple of num_attention"),
        ({"model_type": "clip"}, "text_config, vision_config: expected the config of a tower, got none"),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        family(config)


def test_the_default_sizes_of_a_tower_are_those_of_transformers():
    for name in ("clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"):
        adapter, config = family({"model_type": name}), transformers.AutoConfig.for_model(name)
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        assert (adapter.layers, adapter.size, adapter.heads("q")) == sizes


def test_a_calibration_that_runs_blocks_one_by_one_refuses_albert(tmp_path):
    from tiny import add_tokenizer

    KIN["albert"].model(torch.float32).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match="one by one over a text, but it runs the same block at several depths"
    ):
        gk.statistics.collect(tmp_path, ["abc"])
    model = transformers.AutoModel.from_pretrained(tmp_path)
    (moments,) = gk.statistics.observe(model, ["abc", "de"])
    assert moments["q"].count == 3 * 5  # every token, at each of three depths
    report = gk.inspect(tmp_path, text=["abc", "de"])
    assert report["token_cosine"] is not None
    assert [row["token_cosine"] for row in report["layers"]] == [None]


def test_heads_of_mpnet_share_one_table_of_positions():
    """Their orders are those of one layer: the bias of a column is a head's in all of them."""
    report = gk.inspect({"model_type": "mpnet", **TEXT})
    assert report["permutation_bits"] == pytest.approx(math.log2(6), rel=1e-12)
    report = gk.inspect({"model_type": "bert", **TEXT})
    assert report["permutation_bits"] == pytest.approx(2 * math.log2(6), rel=1e-12)
