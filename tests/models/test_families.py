"""Adapters: a view says what the model computes, and writing it back gives the same tensors."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gaugekit import models  # noqa: E402


def bert(**changes):
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=32,
        max_position_embeddings=16,
        attn_implementation="eager",
        **changes,
    )
    return randomise(transformers.BertModel(config))


def gpt2(cls=None, **changes):
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=24, n_head=3, n_layer=2, n_positions=16, attn_implementation="eager", **changes
    )
    return randomise((cls or transformers.GPT2LMHeadModel)(config))


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.double().eval()


def attention_module(model, layer):
    block = models.Live(model).family.blocks(model)[layer]
    return block.attn if hasattr(block, "attn") else block.attention


@pytest.mark.parametrize("make", [bert, gpt2])
def test_view_computes_what_the_module_computes(make):
    model = make()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for layer in range(2):
        view = models.Live(model).attention(layer)
        module = attention_module(model, layer)
        if make is gpt2:
            mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            out = module(x, attention_mask=mask)[0]
        else:
            out = module.output.dense(module.self(x)[0])
        torch.testing.assert_close(view.attend(x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(models.llama.NAMES) - set(models.llama.NORMED)))
def test_rotary_view_computes_what_the_module_computes(name):
    config = transformers.AutoConfig.for_model(
        name, vocab_size=60, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=32, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, head_dim=8,
    )  # fmt: skip
    model = randomise(transformers.AutoModel.from_config(config, attn_implementation="eager"))
    live, x = models.Live(model), torch.randn(2, 7, 24, dtype=torch.float64)
    positions = model.rotary_emb(x, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for layer in range(2):
        view = live.attention(layer)
        out = model.layers[layer].self_attn(x, position_embeddings=positions, attention_mask=mask)[0]
        torch.testing.assert_close(
            view.attend(x), out, rtol=1e-5, atol=1e-5
        )  # angles are float32 in the module
        for tensor, value in live.family.store(layer, view).tensors.items():
            assert torch.equal(value, live.read(tensor)), tensor


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_partial_rotary_view_computes_what_the_module_computes(share):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": share}
    config = transformers.StableLmConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=32, use_qkv_bias=True, rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip
    model = randomise(transformers.StableLmModel(config))
    live, x = models.Live(model), torch.randn(2, 7, 32, dtype=torch.float64)
    positions = model.rotary_emb(x, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for layer in range(2):
        view = live.attention(layer)
        assert view.rotary == 8 * share
        out = model.layers[layer].self_attn(x, position_embeddings=positions, attention_mask=mask)[0]
        torch.testing.assert_close(view.attend(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "rotary"),
    [
        ({}, 2),
        ({"partial_rotary_factor": 0.5}, 4),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 9.0}}, 4),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}}, 6),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, 4),
    ],
)
def test_the_rotary_share_stands_where_transformers_finds_it(entries, rotary):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "stablelm", "num_hidden_layers": 1, **sizes}
    assert models.family({**config, **entries}).outline(0).rotary == rotary
    module = transformers.StableLmModel(transformers.StableLmConfig(vocab_size=8, **sizes, **entries))
    assert module.layers[0].self_attn.rotary_ndims == rotary


@pytest.mark.parametrize("make", [bert, gpt2])
def test_store_inverts_attention(make):
    live = models.Live(make())
    for layer in range(2):
        stored = live.family.store(layer, live.attention(layer))
        assert stored.modules == {}
        assert {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()} == live.family.shapes(
            layer
        )
        for name, tensor in stored.tensors.items():
            assert torch.equal(tensor, live.read(name)), name


def test_absent_biases_are_stored_as_zeros():
    live = models.Live(gpt2())
    view = live.attention(0)
    without = models.AttentionView(
        view.q, models.Projection(view.k.weight), view.v, models.Projection(view.o.weight), scale=view.scale
    )
    stored = live.family.store(0, without).tensors
    bias = stored["h.0.attn.c_attn.bias"]
    assert torch.equal(bias[:24], view.q.bias.flatten())
    assert bias[24:48].count_nonzero() == 0
    assert stored["h.0.attn.c_proj.bias"].count_nonzero() == 0


def test_prefix():
    family = models.FAMILIES["bert"]({"model_type": "bert"})
    for prefix in ("", "bert.", "0.auto_model."):
        assert family.prefix([prefix + family.anchor, "pooler.dense.weight"]) == prefix
    with pytest.raises(ValueError, match="got none"):
        family.prefix(["xencoder.layer.0.attention.output.dense.weight"])
    with pytest.raises(ValueError, match="several"):
        family.prefix(["a." + family.anchor, "b." + family.anchor])
    assert models.Live(gpt2()).prefix == "transformer."
    assert models.Live(gpt2(transformers.GPT2Model)).prefix == ""


def test_outline_has_the_shapes_without_numbers():
    live = models.Live(bert())
    outline, view = live.family.outline(0), live.attention(0)
    assert outline.q.weight.is_meta
    assert outline.q.weight.shape == view.q.weight.shape == (3, 24, 8)
    assert outline.o.weight.shape == view.o.weight.shape == (3, 8, 24)
    assert models.parameters(outline) == 4 * (24 * 24 + 24)


def test_gpt2_scale():
    view = models.Live(gpt2(scale_attn_by_inverse_layer_idx=True)).attention(1)
    assert view.scale == pytest.approx(8**-0.5 / 2)
    assert models.Live(gpt2(scale_attn_weights=False)).attention(1).scale == 1.0


@pytest.mark.parametrize(
    ("kind", "made_anew", "stored"),
    [
        ("gpt2", ["transformer.h.3.attn.bias", "h.0.attn.masked_bias"], ["h.0.attn.c_attn.bias", "h.0.mlp.c_fc.bias"]),
        ("gptj", ["transformer.h.3.attn.bias", "h.0.attn.masked_bias"], ["h.0.mlp.fc_in.bias"]),
        ("gpt_neo", ["transformer.h.3.attn.attention.bias"], ["h.0.attn.attention.out_proj.bias"]),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.bias", "layers.11.attention.masked_bias",
             "gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
            ["layers.0.attention.dense.bias", "layers.0.attention.query_key_value.bias"],
        ),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"], ["model.layers.0.self_attn.q_proj.weight"]),
    ],
)  # fmt: skip
def test_masks_and_angles_of_old_files_are_no_parameters(kind, made_anew, stored):
    family = models.FAMILIES[kind]({"model_type": kind})
    assert all(family.recomputed(name) for name in made_anew)
    assert not any(family.recomputed(name) for name in stored)


STABLELM = {
    "model_type": "stablelm", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "rope_theta": 10_000,
}  # fmt: skip
FALCON = {**STABLELM, "model_type": "falcon"}
GPTJ = {"model_type": "gptj", "n_embd": 32, "n_head": 4, "n_layer": 1}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 1}
BERT = {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv"}, "expected one of .*bert, .*camembert, .*xlm-roberta; got 'rwkv'"),
        ({}, "xlm-roberta; got None"),
        ({"model_type": "bert"}, "hidden_size"),
        ({**BERT, "position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({**BERT, "add_cross_attention": True}, "add_cross_attention"),
        ({**BERT, "pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({**BERT, "hidden_size": 25}, "hidden_size"),
        (
            {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "add_cross_attention": True},
            "add_cross_attention",
        ),
        ({"model_type": "gpt2", "n_embd": 25, "n_head": 3}, "n_embd"),
        ({**STABLELM, "head_dim": 16}, "hidden_size: expected 4 heads of width 16, got 32"),
        (
            {**STABLELM, "partial_rotary_factor": 0.4},
            "partial_rotary_factor: expected .* even number of 8 .*got 3",
        ),
        ({**STABLELM, "partial_rotary_factor": 1.25}, "partial_rotary_factor: .* got 10"),
        ({**STABLELM, "model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv: expected null, got 8.0"),
        ({**STABLELM, "model_type": "gpt_neox", "rotary_pct": 0.4}, "rotary_pct: .*even number of 8.*got 3"),
        ({**STABLELM, "model_type": "gpt_neox", "hidden_size": 30}, "hidden_size: .*multiple.*=4, got 30"),
        ({**STABLELM, "model_type": "phi3", "num_key_value_heads": 3}, "num_key_value_heads: .*got 3"),
        ({**STABLELM, "model_type": "smollm3", "no_rope_layers": []}, "no_rope_layers: .*1 layers, got 0"),
        (
            {**STABLELM, "model_type": "cohere2", "num_hidden_layers": 2, "layer_types": ["x"]},
            "layer_types: .*got 1",
        ),
        ({**FALCON, "num_attention_heads": 3}, "hidden_size: .*multiple.*=3, got 32"),
        (
            {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3},
            "num_kv_heads: .*divisor of 4.*got 3",
        ),
        ({**FALCON, "hidden_size": 36}, "head_dim: .*even number of 9 channels, got 9"),
        ({**GPTJ, "rotary_dim": 10}, "rotary_dim: .*even number of 8 channels, got 10"),
        ({**GPTJ, "n_embd": 34}, "n_embd: .*multiple.*=4, got 34"),
        (GPTJ, "rotary_dim: .*even number of 8 channels, got 64"),
        ({**MPT, "attn_config": {"clip_qkv": 8}}, "clip_qkv null, got 8"),
        ({**MPT, "d_model": 34}, "d_model: .*multiple.*=4, got 34"),
        ({"model_type": "mpt"}, "expected an entry 'd_model', got none"),
        ({"model_type": "bloom", "n_embed": 34, "n_head": 4}, "hidden_size: .*multiple.*=4, got 34"),
        ({"model_type": "gpt_neo", "hidden_size": 34, "num_heads": 4}, "hidden_size: .*multiple.*=4, got 34"),
        ({"model_type": "gpt_bigcode", "n_embd": 34, "n_head": 4}, "n_embd: .*multiple.*=4, got 34"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        models.family(config)


def test_a_tensor_of_the_wrong_shape_or_kind_is_named():
    live = models.Live(bert())
    with pytest.raises(ValueError, match=r"query.weight: expected shape \(24, 24\).*got \(24, 23\)"):
        live.family.attention(0, lambda name: torch.zeros(24, 23))
    with pytest.raises(ValueError, match="floating-point"):
        live.family.attention(
            0,
            lambda name: torch.zeros(live.family.shapes(0)[name], dtype=torch.int8),
        )


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ValueError, match="expected numbers in encoder.layer.0.*meta"):
        models.Live(bert().to("meta")).attention(0)


def test_a_module_without_config_is_refused():
    with pytest.raises(ValueError, match="transformers model"):
        models.Live(torch.nn.Linear(2, 2))
