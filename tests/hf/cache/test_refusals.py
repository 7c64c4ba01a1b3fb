"""Where one tensor cannot stand for keys and values: nothing is exchanged, and the report says why. All is undone."""

import copy
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import gaugekit as gk
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
from single_cache_models import CACHE, HEADS, TOKENS, gemma4, generate, gpt2, model, opt, prompts, sas

SMALL = {"hidden_size": 32, "intermediate_size": 48, **HEADS, **TOKENS}
REFUSED = {
    "rotary": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "x", r"turns its keys by position \(RoPE\)"),
    "shared heads": (
        lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, **TOKENS)),
        "x",
        "4 heads share keys and values",
    ),
    "ALiBi": (lambda: BloomForCausalLM(BloomConfig(**SMALL)), "x", "a bias of position"),
    "table of biases": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **TOKENS)),
        "x",
        "a bias of position",
    ),
    "encoder": (lambda: BertModel(BertConfig(**SMALL)), "x", "sees tokens on both sides"),
    "no such layers": (gpt2, "v", "no layer has keys that are its values"),
    "a family without an adapter": (gemma4, "x", "model_type: expected one of"),
    "projections of their own": (lambda: gemma4(attention_k_eq_v=False), "v", "a projection of their own"),
    "read by later layers": (lambda: gemma4(num_kv_shared_layers=2), "v", "later layers read its keys"),
    "angles that change": (
        lambda: gemma4(
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            }
        ),
        "v",
        "change while a text grows",
    ),
    "both sides": (lambda: gemma4(use_bidirectional_attention="all"), "v", "sees tokens on both sides"),
    "SAS, rotary": (lambda: sas(rope=True), "x", r"turns its keys by position \(RoPE\)"),
    "SAS, shared values": (lambda: sas(block="pre_ln", num_key_value_heads=2), "x", "heads share values"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_left_as_it_was_with_the_reason(name):
    make, cache, reason = REFUSED[name]
    plain = make().eval()
    report = gk.fuse(plain, cache=cache)
    assert report["cached"] == []
    assert any(
        entry["reason"].startswith("cache: ") and re.search(reason, entry["reason"])
        for entry in report["left"]
    ), report["left"]
    assert not any("forward" in module.__dict__ for module in plain.modules())
    assert dict(report.lines)["cache"] == "keys and values in every layer, as before"


def test_only_the_layers_for_which_it_is_exact():
    report = gk.fuse(model("gemma4"), cache="v")
    assert [layer["module"] for layer in report["cached"]] == [f"model.layers.{i}.self_attn" for i in (1, 3)]
    left = {entry["module"]: entry["reason"] for entry in report["left"]}
    assert left == dict.fromkeys(
        [f"model.layers.{i}.self_attn" for i in (0, 2)],
        "cache: it sees the last tokens only, so its cache does not grow",
    )
    assert "2 layers keep their values alone" in dict(report.lines)["cache"]
    assert "50.0 % smaller" in dict(report.lines)["cache"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma4", "sas"])
def test_unfuse_undoes_everything(name):
    made = model(name)
    state = {key: value.clone() for key, value in made.state_dict().items()}
    modules, attributes = dict(made.named_modules()), {m: set(m.__dict__) for m in made.modules()}
    config, batch = made.config.to_dict(), prompts()
    expected = generate(made, *batch)
    gk.fuse(made, cache="v" if name == "gemma4" else "x")
    assert made.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in made.state_dict().items())
    gk.unfuse(made)
    assert dict(made.named_modules()) == modules and made.config.to_dict() == config
    assert {m: set(m.__dict__) for m in made.modules()} == attributes
    got = generate(made, *batch)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ["gpt2", "gemma4", "sas"])
def test_caches_of_before_and_after_are_told_apart(name):
    fused = model(name)
    (ids, _), held = prompts(padded=False), []
    for stage in (0, 1):
        if stage:
            gk.fuse(fused, cache="v" if name == "gemma4" else "x")
        held.append(DynamicCache(config=fused.config))
        fused(ids, **{CACHE: held[-1]})
    with pytest.raises(ValueError, match="begin another"):
        fused(ids[:, :1], **{CACHE: held[0]})
    gk.unfuse(fused)
    with pytest.raises(ValueError, match="begin another"):
        fused(ids[:, :1], **{CACHE: held[1]})


def test_caches_of_other_kinds_are_refused():
    fused = model("gpt2")
    gk.fuse(fused, cache="x")
    cache = DynamicCache()
    fused(prompts()[0], **{CACHE: cache})  # layers made on demand are taken
    with pytest.raises(ValueError, match="dynamic or static layers"):
        fused(prompts()[0], **{CACHE: _Other()})
    static = StaticCache(config=fused.config, max_cache_len=4)
    with pytest.raises((RuntimeError, IndexError)):
        fused(prompts()[0], **{CACHE: static})


class _Other(DynamicCache):
    """A cache whose layers are of a kind that is not known."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = type("Layer", (type(DynamicCache().layer_class_to_replicate()),), {})


def test_attention_weights_and_other_masks_are_refused():
    fused = model("gpt2")
    gk.fuse(fused, cache="x")
    ids, _ = prompts()
    with pytest.raises(ValueError, match="output_attentions"):
        fused(ids, output_attentions=True, use_cache=True)
    mask = torch.zeros(3, 1, 9, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="attention_mask"):
        fused(ids, attention_mask=mask, use_cache=True)
    fused.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention_mask: expected that of attn_implementation='gaugekit'"):
        fused(ids, use_cache=True)


@pytest.mark.parametrize("name", ["gpt2", "gemma4"])
def test_a_mask_that_forgets_earlier_padding_is_refused(name):
    fused = model(name)
    gk.fuse(fused, cache="v" if name == "gemma4" else "x")
    ids, mask = prompts()
    cache = DynamicCache(config=fused.config)
    fused(ids, attention_mask=mask, **{CACHE: cache})
    with pytest.raises(ValueError, match="attention_mask: expected one"):
        fused(ids[:, :1], **{CACHE: cache})


def test_positions_that_do_not_count_on_are_refused():
    fused = model("gemma4")
    gk.fuse(fused, cache="v")
    ids, _ = prompts(padded=False)
    plain, twin = copy.deepcopy(fused), copy.deepcopy(fused)
    gk.unfuse(plain)
    shifted = torch.arange(100, 109)[None].expand(3, -1)  # angles count by what lies between
    got, expected = (m(ids, position_ids=shifted, use_cache=True).logits for m in (twin, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    cache = DynamicCache(config=fused.config)
    fused(ids, position_ids=shifted, **{CACHE: cache})
    with pytest.raises(ValueError, match="position_ids: expected one that fits"):
        fused(ids[:, :1], position_ids=torch.full((3, 1), 3), **{CACHE: cache})
    with pytest.raises(ValueError, match="position_ids: expected one that fits"):
        fused(ids, position_ids=torch.arange(0, 18, 2)[None], use_cache=True)


@pytest.mark.parametrize("name", ["gpt2", "sas"])
def test_continuous_batching_is_refused(name):
    fused = model(name)
    gk.fuse(fused, cache="x")
    with pytest.raises(ValueError, match="continuous batching: expected a model that caches keys and values"):
        fused.init_continuous_batching()


def test_what_comes_without_it():
    for options in ({"gauge": True}, {"neutreno": 0.5}):
        with pytest.raises(
            ValueError, match="cache: expected None, or one of x, v without gauge and neutreno"
        ):
            gk.fuse(gpt2(), cache="x", **options)
    with pytest.raises(ValueError, match="cache: expected None, or one of x, v"):
        gk.fuse(gpt2(), cache="k")
    report = gk.fuse(gpt2(), cache="x", attention=False)
    assert "it needs attn_implementation='gaugekit'" in report["left"][0]["reason"]


def test_packed_projections_are_left():
    made = opt(hidden_size=128, word_embed_proj_dim=128).bfloat16()
    report = gk.fuse(made, cache="x", packed=True)
    assert report["cached"] == []
    assert any("no plain projection but a PackedLinear" in entry["reason"] for entry in report["left"])
    made = model("gemma4", torch.bfloat16, hidden_size=128)
    report = gk.fuse(made, cache="v", packed=True)  # whose projections only project
    assert report["cached"] and "model.layers.1.self_attn.k_proj" in {
        row["module"] for row in report["replaced"]
    }
    generate(made, *prompts())


def test_hooks_and_exchanged_forwards_are_left():
    made = gpt2()
    made.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: None)
    made.transformer.h[1].attn.forward = made.transformer.h[1].attn.forward
    report = gk.fuse(made, cache="x")
    reasons = [entry["reason"] for entry in report["left"]]
    assert "has hooks" in reasons[0] and "exchanged already" in reasons[1] and report["cached"] == []


def test_an_adapter_added_later_is_not_overlooked():
    fused = model("gpt2")
    gk.fuse(fused, cache="x")
    fused.transformer.h[0].attn.c_attn.add_module("lora", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cache: expected plain projections"):
        fused(prompts()[0], use_cache=True)


def test_quantized_caches_are_refused():
    fused = model("gpt2", torch.float32)
    gk.fuse(fused, cache="x")
    try:
        cache = QuantizedCache("quanto", fused.config)
    except ImportError:
        pytest.skip("needs optimum-quanto")
    with pytest.raises(ValueError, match="dynamic or static layers"):
        fused(prompts()[0], **{CACHE: cache})


def test_blocks_by_themselves():
    config = SASConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=2, vocab_size=20)
    blocks = torch.nn.Sequential(*SASForCausalLM(config).double().model.layers)
    report = gk.fuse(blocks, cache="x")
    assert [layer["bytes_after"] for layer in report["cached"]] == [16 * 8] * 2
    x, caches = torch.randn(2, 6, 16, dtype=torch.float64), [gk.nn.LayerCache() for _ in blocks]
    parts = []
    for piece in x.split([4, 1, 1], 1):
        for block, cache in zip(blocks, caches, strict=True):
            piece = block(piece, cache=cache)
        parts.append(piece)
    torch.testing.assert_close(torch.cat(parts, 1), blocks(x))
    assert all(cache.values is None for cache in caches)
    gk.unfuse(blocks)
    assert not any(block.attention.single_cache for block in blocks)


@pytest.mark.parametrize("name", ["gpt2", "opt", "sas"])
def test_hooks_on_what_is_read_raw_are_refused_before_and_after(name):
    ending = {"gpt2": "c_attn", "opt": "v_proj", "sas": "key"}[name]
    fused = model(name)
    path = next(path for path, _ in fused.named_modules() if path.endswith(ending))
    gk.fuse(fused, cache="x")
    ids, _ = prompts(padded=False)
    cache = DynamicCache(config=fused.config)
    fused(ids, **{CACHE: cache})
    handle = fused.get_submodule(path).register_forward_hook(lambda module, given, y: y * 0.5)
    with pytest.raises(ValueError, match="with hooks, which would not be run"):
        fused(ids[:, :1], **{CACHE: cache})
    gk.unfuse(fused)
    left = gk.fuse(fused, cache="x")["left"]
    assert any("hooks, which would not be run" in entry["reason"] for entry in left)
    handle.remove()


def test_a_model_that_is_fused_already_says_so():
    fused = model("gpt2")
    gk.fuse(fused, cache="x")
    report = gk.fuse(fused, cache="x")
    assert report["cached"] == [] and "fused already" in report["left"][0]["reason"]
    assert "cache" not in dict(report.lines)  # nothing is said of what it keeps
