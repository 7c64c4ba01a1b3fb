"""Views of decoders: they say what the module computes, in each layer, and read configs old and new."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from decoder_rows import DECODERS, LLAMA, NORMED  # noqa: E402
from gaugekit import models  # noqa: E402
from gaugekit.models.decoders.fused.alibi import slopes  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402


def made(name):
    """A row as a model, every number random; and four tokens, as many as its windows let one see."""
    kind, config, sizes, _ = {**DECODERS, **NORMED}[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products lack float64
    return model, torch.randint(3, 60, (2, 4))


@pytest.mark.parametrize("name", [*DECODERS, *NORMED])
def test_a_decoders_view_computes_what_its_module_computes(name):
    """As deep in the model as it stands: what enters the module and what leaves it are caught."""
    model, ids = made(name)
    live, calls = models.Live(model), {}

    def catch(module, arguments, named, output):
        x = arguments[0] if arguments else named["hidden_states"]
        added = arguments[1] if name == "bloom" else 0.0  # its attention adds the stream by itself
        calls[module] = x, output[0] - added

    for layer in range(2):
        path = live.prefix + live.family.projections(layer)["o"]
        model.get_submodule(path.rpartition(".")[0]).register_forward_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(ids)
    assert len(calls) == 2
    # angles, and the scores of some, are float32 in the module
    exact = name.startswith(("gpt_bigcode", "falcon with alibi"))
    bound = 1e-12 if exact else 1e-5
    for layer, (x, output) in enumerate(calls.values()):
        error = (live.attention(layer).attend(x) - output).norm() / output.norm()
        assert error < bound


@pytest.mark.parametrize("name", ["gptj", "glm", "cohere"])
def test_neighbours_turn_together(name):
    live = models.Live(made(name)[0])
    view = live.attention(0)
    rotary = {"gptj": 4, "glm": 4, "cohere": 8}[name]
    assert view.pairs.mT.tolist() == [[i, i + 1] for i in range(0, rotary, 2)]
    other = replace(view, interleaved=False)
    x = torch.randn(1, 4, view.q.weight.shape[1], dtype=torch.float64)
    assert (other.attend(x) - view.attend(x)).norm() > 1e-3 * view.attend(x).norm()
    q, k = (part.weight.clone() for part in (view.q, view.k))
    q[:, :, 2:4] = k[:, :, 2] = k[:, :, 3] = 0  # one pair of neighbours idle
    idle = replace(view, q=models.Projection(q), k=models.Projection(k))
    assert models.used_channels(idle) == ((0, 1, *range(4, 8)),) * view.groups


@pytest.mark.parametrize("heads", [1, 4, 12, 71])
def test_slopes_are_those_of_the_models(heads):
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    own = torch.tensor(slopes(heads))
    torch.testing.assert_close(own, _get_alibi_slopes(heads, torch.device("cpu")), rtol=1e-6, atol=0)
    steps = build_mpt_alibi_tensor(heads, 2)[:, 0].diff()
    torch.testing.assert_close(own, steps.flatten(), rtol=1e-6, atol=0)


def test_layers_without_rotary_positions():
    """SmolLM3's list says 1 where a layer turns; without it every fourth does not. Cohere 2 turns under its window."""
    smol = {"model_type": "smollm3", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 5}
    cohere = {**smol, "model_type": "cohere2"}
    for config, expected in (
        (smol, [8, 8, 8, 0, 8]),
        ({**smol, "no_rope_layer_interval": 2}, [8, 0, 8, 0, 8]),
        ({**smol, "no_rope_layers": [0, 1, 1, 0, 1, 1]}, [0, 8, 8, 0, 8]),
        (cohere, [8, 8, 8, 0, 8]),
        ({**cohere, "sliding_window_pattern": 2}, [8, 0, 8, 0, 8]),
        ({**cohere, "layer_types": ["full_attention"] * 5}, [0] * 5),
    ):
        family = models.family(config)
        assert [family.outline(layer).rotary for layer in range(5)] == expected


# Configs as published files have them, older ones among them: (entries, channels that turn, scale, numbers that go).
PUBLISHED = {
    "pythia-70m": (
        dict(model_type="gpt_neox", hidden_size=512, num_attention_heads=8, num_hidden_layers=6, rotary_pct=0.25,
             rotary_emb_base=10000),
        16, 64**-0.5, 6 * 8 * (64**2 + 64),
    ),
    "gpt-j-6b": (
        dict(model_type="gptj", n_embd=4096, n_head=16, n_layer=28, rotary=True, rotary_dim=64),
        64, 256**-0.5, 28 * 16 * 256**2,
    ),
    "bloom-560m": (
        dict(model_type="bloom", n_embed=1024, num_attention_heads=16, n_layer=24, n_inner=None),
        0, 64**-0.5, 24 * 16 * (2 * 64**2 + 2 * 64),
    ),
    "gemma-3-1b": (
        dict(model_type="gemma3_text", hidden_size=1152, num_attention_heads=4, num_key_value_heads=1,
             num_hidden_layers=26, head_dim=256, query_pre_attn_scalar=256, rope_theta=1000000.0,
             rope_local_base_freq=10000.0, sliding_window=512, sliding_window_pattern=6),
        256, 256**-0.5, 26 * 256**2,
    ),
    "falcon-7b": (
        dict(model_type="falcon", hidden_size=4544, num_attention_heads=71, num_hidden_layers=32, multi_query=True,
             alibi=False, bias=False, new_decoder_architecture=False),
        64, 64**-0.5, 32 * 64**2,
    ),
    "falcon-40b": (
        dict(model_type="falcon", hidden_size=8192, num_attention_heads=128, num_hidden_layers=60, num_kv_heads=8,
             alibi=False, bias=False, new_decoder_architecture=True, multi_query=True),
        64, 64**-0.5, 60 * 8 * 64**2,
    ),
    "falcon-rw-1b": (
        dict(model_type="falcon", hidden_size=2048, num_attention_heads=32, num_hidden_layers=24, multi_query=False,
             alibi=True, bias=True, new_decoder_architecture=False),
        0, 64**-0.5, 24 * 32 * (2 * 64**2 + 2 * 64),
    ),
    "mpt-7b": (
        dict(model_type="mpt", d_model=4096, n_heads=32, n_layers=32,
             attn_config={"alibi": True, "clip_qkv": None, "softmax_scale": None}),
        0, 128**-0.5, 32 * 32 * 2 * 128**2,
    ),
    "gpt-neo-125m": (
        dict(model_type="gpt_neo", hidden_size=768, num_heads=12, num_layers=12,
             attention_types=[[["global", "local"], 6]]),
        0, 1.0, 12 * 12 * 2 * 64**2,
    ),
    "starcoderbase-1b": (
        dict(model_type="gpt_bigcode", n_embd=2048, n_head=16, n_layer=24, multi_query=True),
        0, 128**-0.5, 24 * (2 * 128**2 + 2 * 128),
    ),
    "phi-3-mini": (
        dict(model_type="phi3", hidden_size=3072, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32,
             rope_theta=10000.0, rope_scaling=None),
        96, 96**-0.5, 32 * 32 * 96**2,
    ),
    "phi-4-mini": (
        dict(model_type="phi3", hidden_size=3072, num_attention_heads=24, num_key_value_heads=8, num_hidden_layers=32,
             partial_rotary_factor=0.75, rope_scaling={"type": "longrope"}),
        96, 128**-0.5, 32 * 8 * 128**2,
    ),
    "gemma-7b": (
        dict(model_type="gemma", hidden_size=3072, num_attention_heads=16, num_key_value_heads=16,
             num_hidden_layers=28, head_dim=256),
        256, 256**-0.5, 28 * 16 * 256**2,
    ),
    "gemma-2-27b": (
        dict(model_type="gemma2", hidden_size=4608, num_attention_heads=32, num_key_value_heads=16,
             num_hidden_layers=46, head_dim=128, query_pre_attn_scalar=144, attn_logit_softcapping=50.0),
        128, 144**-0.5, 46 * 16 * 128**2,
    ),
    "starcoder2-3b": (
        dict(model_type="starcoder2", hidden_size=3072, num_attention_heads=24, num_key_value_heads=2,
             num_hidden_layers=30, use_bias=True),
        128, 128**-0.5, 30 * 2 * (128**2 + 128),
    ),
    "granite-3.0-2b": (
        dict(model_type="granite", hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
             num_hidden_layers=40, attention_multiplier=0.015625),
        64, 1 / 64, 40 * 8 * 64**2,
    ),
    "smollm3-3b": (
        dict(model_type="smollm3", hidden_size=2048, num_attention_heads=16, num_key_value_heads=4,
             num_hidden_layers=36, no_rope_layers=[1, 1, 1, 0] * 9),
        128, 128**-0.5, (36 + 9) * 4 * 128**2,
    ),
    "command-r7b": (
        dict(model_type="cohere2", hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
             num_hidden_layers=32, sliding_window=4096, sliding_window_pattern=4, head_dim=128),
        128, 128**-0.5, (32 + 8) * 8 * 128**2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_by_their_formulas(name):
    """V² (V more with biases) a key/value head, and where nothing turns and no norm stands between K² (and K)."""
    config, rotary, scale, total = PUBLISHED[name]
    view = models.family(config).outline(0)
    assert view.rotary == rotary and view.scale == pytest.approx(scale, rel=1e-15)
    assert GaugeFix().plan(config)["total"] == total


@pytest.mark.parametrize(
    "name", sorted(set(PUBLISHED) - {"phi-4-mini"})
)  # transformers wants its factors, one a channel
def test_published_configs_say_what_transformers_reads_from_them(name):
    config = PUBLISHED[name][0]
    ours = models.family(config)
    theirs = models.family(transformers.AutoConfig.for_model(**config).to_dict())
    assert ours.layers == theirs.layers
    for layer in range(ours.layers):
        own, other = ours.outline(layer), theirs.outline(layer)
        for entry in (
            "rotary",
            "rotary_base",
            "scale",
            "causal",
            "interleaved",
            "slopes",
            "softcap",
            "barred",
        ):
            assert getattr(own, entry) == getattr(other, entry), (layer, entry)
        assert own.q.weight.shape == other.q.weight.shape and own.k.weight.shape == other.k.weight.shape


@pytest.mark.parametrize("name", ["mistral", "ministral", "mixtral", "qwen2"])
def test_biases_that_a_family_does_not_switch_are_not_believed(name):
    sizes = {**LLAMA, "head_dim": 8, "attention_bias": True}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **sizes))
    view = models.Live(model).attention(0)
    biased = name == "qwen2"
    assert [getattr(view, part).bias is not None for part in "qkvo"] == [biased, biased, biased, False]


@pytest.mark.parametrize(("kind", "entry"), [("modernbert", "layer_types"), ("smollm3", "no_rope_layers")])
def test_lists_that_are_too_short_are_refused(kind, entry):
    config = {"model_type": kind, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=f"{entry}: expected one entry for each of 2 layers, got 1"):
        models.family({**config, entry: ["full_attention"]})


def test_gemma_2_is_causal_whatever_its_config_says():
    config = dict(model_type="gemma2", hidden_size=24, num_attention_heads=3, num_hidden_layers=1, head_dim=8)
    assert models.family({**config, "use_bidirectional_attention": True}).outline(0).causal
    config["model_type"] = "gemma3_text"
    assert not models.family({**config, "use_bidirectional_attention": True}).outline(0).causal
