"""Kin of BERT, Llama and others: each group is fixed where it holds, whatever rules out another."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers  # noqa: E402
from gaugekit.hf import loading  # noqa: E402
from gaugekit.models import FAMILIES, Live, unused_positions  # noqa: E402
from gaugekit.symmetry import SYMMETRIES  # noqa: E402

ENCODER = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32)
TEXT = dict(ENCODER, vocab_size=60, max_position_embeddings=20)
IMAGE = dict(ENCODER, image_size=16, patch_size=8)
DECODER = dict(
    vocab_size=60, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
    intermediate_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OLMO = {name: value for name, value in DECODER.items() if name != "head_dim"}
STABLE = {**OLMO, "hidden_size": 32, "use_qkv_bias": True}
OPT = dict(
    vocab_size=60, hidden_size=24, word_embed_proj_dim=24, num_attention_heads=3, num_hidden_layers=2, ffn_dim=32,
    max_position_embeddings=20, dropout=0.0,
)  # fmt: skip
PHI = {
    **{name: value for name, value in STABLE.items() if name not in ("num_key_value_heads", "use_qkv_bias")},
    "max_position_embeddings": 20,
}
T5 = dict(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)

# name: (class, config class, sizes, the groups that are fixed and what each key/value head of width 8 has of them)
BIASES = {"value_output": 64, "value_bias": 8}
ALL = {**BIASES, "query_key": 64, "key_bias": 8}
KIN = {
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, ALL),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", TEXT, ALL),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", TEXT, ALL),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, ALL),
    "vit bare": ("ViTModel", "ViTConfig", {**IMAGE, "qkv_bias": False}, {"value_output": 64, "query_key": 64}),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGE, ALL),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "attention_bias": True}, BIASES),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, {"value_output": 64},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**OLMO, "hidden_size": 32}, {"value_output": 64}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {**OLMO, "hidden_size": 32}, {"value_output": 64}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", STABLE, {"value_output": 64}),
    "stablelm with norms": (
        "StableLmForCausalLM", "StableLmConfig", {**STABLE, "qk_layernorm": True}, {"value_output": 64}
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, ALL),
    "phi": ("PhiForCausalLM", "PhiConfig", PHI, BIASES),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "query_pre_attn_scalar": 8}, {"value_output": 64}
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", TEXT, ALL),
    "deberta-v2": (
        "DebertaV2Model", "DebertaV2Config", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        BIASES,
    ),
    "deberta-v2 shared": (
        "DebertaV2Model", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
        {**BIASES, "query_key": 64},
    ),
    "t5": ("T5EncoderModel", "T5Config", T5, {"value_output": 64, "query_key": 64}),
}  # fmt: skip


def made(name, dtype=torch.float64):
    """The tiny model, its weights and biases random, so that no zero hides an error; and an input for it."""
    kind, config, sizes, _ = KIN[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products lack float64
    inputs = {"input_ids": torch.randint(3, 60, (2, 9))}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    return model.to(dtype).eval(), inputs


def expected(name, heads):
    counts = dict.fromkeys(SYMMETRIES, 0) | {group: 2 * heads * size for group, size in KIN[name][3].items()}
    return {**counts, "total": sum(counts.values())}


@pytest.mark.parametrize("name", KIN)
def test_every_group_that_holds_is_fixed_and_no_output_moves(name):
    model, inputs = made(name)
    live = Live(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        for group in KIN[name][3]:
            symmetry, view = SYMMETRIES[group], live.attention(1)
            moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(1)))
            live.write(live.family.store(1, moved).tensors)
            assert (model(**inputs)[0] - before).norm() < 1e-12 * before.norm(), group
        report = gk.symmetry.fix(model)
        after = model(**inputs)[0]
    assert (after - before).norm() < 1e-12 * before.norm()
    assert report["removed"] == expected(name, live.attention(0).groups)
    view = live.attention(0)
    assert {note.split(":")[0] for note in report.notes} == set(view.barred)
    assert set(view.barred).isdisjoint(KIN[name][3])


@pytest.mark.parametrize("name", KIN)
def test_an_adapter_names_the_tensors_there_are_and_stores_what_it_read(name):
    live = Live(made(name)[0])
    assert type(live.family) is FAMILIES[live.config["model_type"]] and live.family.config is live.config
    assert len(live) == live.family.layers == 2
    for layer in range(2):
        view, outline = live.attention(layer), live.family.outline(layer)
        stored = live.family.store(layer, view).tensors
        assert {path: tuple(tensor.shape) for path, tensor in stored.items()} == live.family.shapes(layer)
        for path, tensor in stored.items():
            assert torch.equal(tensor, live.read(path)), path
        for part in "qkvo":
            assert getattr(outline, part).weight.is_meta
            assert getattr(outline, part).weight.shape == getattr(view, part).weight.shape


@pytest.mark.parametrize("name", ["qwen3", "deberta-v2", "deberta-v2 shared", "stablelm with norms"])
def test_what_is_left_alone_would_be_seen(name):
    """The key bias there is no symmetry: moving it changes the output."""
    model, inputs = made(name)
    live = Live(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        view = live.attention(0)
        path = live.family.projections(0)["k"]
        model.get_parameter(f"{live.prefix}{path}.bias").add_(torch.randn(view.groups * 8).double())
        assert (model(**inputs)[0] - before).norm() > 1e-4 * before.norm()


@pytest.mark.parametrize("name", ["roberta", "vit", "deit", "qwen3", "stablelm", "opt", "phi"])
def test_through_every_verb(name, tmp_path):
    model, inputs = made(name, torch.float32)
    source = tmp_path / "model"
    model.save_pretrained(source)
    counts = expected(name, Live(model).attention(0).groups)
    assert gk.inspect(source)["unobservable"] == gk.inspect(model)["unobservable"] == counts
    with torch.no_grad():
        output = model(**inputs)[0]
    for dense in (False, True):
        target = tmp_path / f"dense {dense}"
        report = gk.convert(source, target, [gk.symmetry.GaugeFix()], dense=dense)
        gone = report["parameters_before"] - report["parameters_after"]
        assert gone == (0 if dense else counts["total"]) and report["invariance_error"] < 1e-13
        loaded, info = type(model).from_pretrained(target, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (loaded.eval()(**inputs)[0] - output).norm() < 1e-5 * output.norm()
        assert gk.verify(source, target)["ok"]
    loaded = type(model).from_pretrained(tmp_path / "dense False")
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**inputs)[0], loaded.eval()(**inputs)[0])
    truncate = gk.rank.Truncate(6)
    barred = Live(model).attention(0).barred
    if "query_key" in barred:
        with pytest.raises(ValueError, match=f"got a model in which {barred['query_key']}"):
            gk.convert(source, tmp_path / "rank", [truncate])
    else:
        gk.convert(source, tmp_path / "rank", [truncate])
        assert not gk.verify(source, tmp_path / "rank")["ok"]
    report = gk.fuse(model)
    assert report["left"] == [] and report["attention"] == "gaugekit"
    assert report["parameters_before"] - report["parameters_after"] == counts["total"]
    assert (model(**inputs)[0] - output).norm() < 1e-5 * output.norm()
    gk.unfuse(model)
    assert torch.equal(model(**inputs)[0], output)


def test_files_that_name_tensors_as_the_model_does_are_read_too(tmp_path):
    from safetensors.torch import save_file

    model, _ = made("vit", torch.float32)
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert gk.inspect(tmp_path).fields == gk.inspect(model).fields


def test_positions_that_padding_takes_are_not_given_to_tokens():
    assert unused_positions({"model_type": "roberta", "pad_token_id": 1}) == 2
    assert unused_positions({"model_type": "bert", "pad_token_id": 1}) == 0
    assert loading.positions(transformers.RobertaConfig(max_position_embeddings=514)) == 512
    assert loading.positions(transformers.BertConfig()) == 512


@pytest.mark.parametrize("kind", ["bloom", "mpt", "deberta"])
def test_fused_projections_without_an_adapter_are_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}' is not covered: its fused projection"):
        gk.models.family({"model_type": kind})


def test_text_is_refused_where_pixels_are_read():
    model, _ = made("vit", torch.float32)
    with pytest.raises(ValueError, match="text: expected none, since the model reads pixels"):
        gk.verify(model, model, text=["A sentence."])
    roberta, _ = made("roberta", torch.float32)
    with pytest.raises(
        ValueError, match="b: expected a model that reads pixel_values, as a does, got input_ids"
    ):
        gk.verify(model, roberta)
