"""DINOv2, and CLIP and SigLIP: towers for images alone, and beside those for text."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import kin as checks  # noqa: E402
from gaugekit.models import Live, family  # noqa: E402
from kin import ALL, IMAGE, TEXT, Kin  # noqa: E402

TEXTS = dict(TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=59, projection_size=24)
BOTH = dict(text_config=TEXTS, vision_config=IMAGE)
BARE = {"value_output": 64, "query_key": 64}

KIN = {
    "dinov2": Kin("Dinov2ForImageClassification", "Dinov2Config", dict(IMAGE, mlp_ratio=1), [ALL] * 2),
    "dinov2 bare": Kin(
        "Dinov2Model", "Dinov2Config", dict(IMAGE, qkv_bias=False, use_swiglu_ffn=True), [BARE] * 2
    ),
    "dinov2_with_registers": Kin(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", dict(IMAGE, mlp_ratio=1), [ALL] * 2
    ),
    "clip_vision_model": Kin("CLIPVisionModel", "CLIPVisionConfig", IMAGE, [ALL] * 2),
    "siglip_vision_model": Kin("SiglipVisionModel", "SiglipVisionConfig", IMAGE, [ALL] * 2),
    "clip": Kin("CLIPModel", "CLIPConfig", dict(BOTH, projection_dim=16), [ALL] * 4),
    "clip for images": Kin("CLIPForImageClassification", "CLIPConfig", BOTH, [ALL] * 2),
    "siglip": Kin("SiglipModel", "SiglipConfig", BOTH, [ALL] * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", KIN)
def test_every_group_that_holds_is_fixed_and_no_output_moves(name):
    checks.check_groups(KIN[name])


@pytest.mark.parametrize("name", KIN)
def test_an_adapter_names_the_tensors_there_are_and_stores_what_it_read(name):
    checks.check_adapter(KIN[name])


@pytest.mark.parametrize("name", KIN)
def test_a_view_computes_what_the_module_computes(name):
    checks.check_view(KIN[name])


@pytest.mark.parametrize("name", KIN)
def test_through_every_verb(name, tmp_path):
    checks.check_verbs(KIN[name], tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_heads_are_turned_until_rows_are_triangular(name):
    kin = KIN[name]
    checks.check_turned(lambda dtype: (model := kin.model(dtype), checks.inputs_of(model)), kin.counts)


def test_a_text_tower_is_causal_in_clip_alone():
    for name, causal in (("clip", True), ("siglip", False)):
        live = Live(KIN[name].model())
        assert [live.attention(layer).causal for layer in range(4)] == [causal, causal, False, False]


def test_a_published_config_leaves_its_sizes_out():
    towers = {f"{tower}_config": {"model_type": f"siglip_{tower}_model"} for tower in ("text", "vision")}
    adapter = family({"model_type": "siglip", **towers})
    assert adapter.layers == 24 and adapter.outline(23).q.weight.shape == (12, 768, 64)
    assert adapter.block(12) == "vision_model.encoder.layers.0"


def test_a_tower_for_images_reads_no_text_that_its_model_could(tmp_path):
    from tiny import add_tokenizer

    KIN["clip"].model(torch.float32).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    report = gk.inspect(tower)
    assert report["token_cosine"] is None and checks.removable(report) == KIN["clip_vision_model"].counts


def test_two_towers_read_no_one_text():
    model = KIN["clip"].model(torch.float32)
    report = gk.inspect(model)
    assert "token_cosine: not computed, since one of its towers reads text, the other images" in report.notes
    assert report["token_cosine"] is None
    with pytest.raises(ValueError, match="text: expected none for this model, since one of its towers"):
        gk.inspect(model, text=["A sentence."])
    with pytest.raises(ValueError, match="pool: expected None"):
        gk.verify(model, model, pool="mean")


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_tower_loads_out_of_a_compact_model(name, fused, tmp_path):
    model = KIN[name].model(torch.float32)
    inputs = checks.inputs_of(model)
    model.save_pretrained(tmp_path / "model")
    if fused:
        gk.fuse(model)
        model.save_pretrained(tmp_path / "compact")
        gk.unfuse(model)
        assert not hasattr(model.config.text_config, "quantization_config")
    else:
        gk.convert(tmp_path / "model", tmp_path / "compact", [gk.symmetry.GaugeFix()])
    for tower, read in (("text_model", "input_ids"), ("vision_model", "pixel_values")):
        kind = type(model.get_submodule(tower))
        loaded, info = kind.from_pretrained(tmp_path / "compact", output_loading_info=True)
        assert not info["missing_keys"]
        assert checks.close(
            checks.run(loaded.eval(), {read: inputs[read]}),
            checks.run(model.get_submodule(tower), {read: inputs[read]}),
        )


def test_a_decoder_of_text_beside_an_encoder_of_images_is_refused():
    decoder = dict(
        vocab_size=60, n_embd=24, n_head=3, n_layer=1, n_positions=20, bos_token_id=0, eos_token_id=0
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**IMAGE), transformers.GPT2Config(**decoder)
    )
    model = transformers.VisionEncoderDecoderModel(config)
    with pytest.raises(
        ValueError, match="a: expected a model that reads pixels alone, got one with a decoder"
    ):
        gk.verify(model, model)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_verify_sees_a_change_in_either_tower(name):
    model = KIN[name].model(torch.float32)
    assert gk.verify(model, model)["ok"]
    for tower in ("text_model", "vision_model"):
        other = KIN[name].model(torch.float32)
        with torch.no_grad():
            other.get_submodule(f"{tower}.encoder.layers.1.self_attn.v_proj").weight.mul_(1.001)
        report = gk.verify(model, other)
        assert not report["ok"] and report["output"] == "logits_per_image"
        assert len(report["layers"]) == 6  # three hidden states of each tower


def test_what_old_files_say_of_a_tower_goes_before():
    config = {
        "model_type": "clip",
        "text_config": {"hidden_size": 512, "num_attention_heads": 8},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 3},
        "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2},
    }
    theirs = transformers.CLIPConfig(
        **{name: entry for name, entry in config.items() if name != "model_type"}
    )
    adapter = family(config)
    assert (
        adapter.layers == theirs.text_config.num_hidden_layers + theirs.vision_config.num_hidden_layers == 5
    )
    assert [adapter.outline(layer).q.weight.shape[1] for layer in (0, 4)] == [768, 1024]
