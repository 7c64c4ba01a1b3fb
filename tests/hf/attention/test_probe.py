"""fuse and loading give our attention only to models that compute the same with it; others stay as they are."""

import random

import numpy
import pytest
import torch
import transformers as tr

import gaugekit as gk
from gaugekit.hf.attention import probe
from gaugekit.hf.quantizer import GaugekitConfig

SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GROUPS = dict(SMALL, num_key_value_heads=2, head_dim=8)
IDS = torch.arange(7, 27).reshape(2, 10)
TAKEN = {
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPS)),
    "gemma3": lambda: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**GROUPS, sliding_window=4)),
    "mixtral": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**GROUPS, num_local_experts=4)),
    "bert": lambda: tr.BertModel(tr.BertConfig(**SMALL)),
    "bart": lambda: tr.BartForConditionalGeneration(
        tr.BartConfig(
            vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        )
    ),
}  # fmt: skip
LEFT = {
    "bloom": lambda: tr.BloomForCausalLM(tr.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
    "xglm": lambda: tr.XGLMForCausalLM(
        tr.XGLMConfig(vocab_size=99, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64)
    ),
    "roformer": lambda: tr.RoFormerForCausalLM(tr.RoFormerConfig(**SMALL, is_decoder=True)),
    "falcon": lambda: tr.FalconForCausalLM(
        tr.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "mpt": lambda: tr.MptForCausalLM(tr.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4)),
    "t5": lambda: tr.T5EncoderModel(
        tr.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "gemma2": lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**GROUPS)),
    "gpt_oss": lambda: tr.GptOssForCausalLM(
        tr.GptOssConfig(**GROUPS, num_local_experts=2, num_experts_per_tok=1)
    ),
}


def outputs(model, **more):
    inputs = {"input_ids": IDS} | more
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", TAKEN)
def test_a_model_that_computes_the_same_takes_it(name):
    model = TAKEN[name]().eval()  # in float32: experts have no float64
    before = outputs(model)
    report = gk.fuse(model, gauge=False)
    assert report["attention"] == "gaugekit" and report["left"] == []
    assert (outputs(model) - before).norm() <= probe.LIMIT * before.norm()
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    padded = outputs(model, attention_mask=mask)
    gk.unfuse(model)
    assert model.config._attn_implementation == "sdpa"
    real = mask.bool() if name != "bart" else slice(None)  # the decoder has no padding
    expected = outputs(model, attention_mask=mask)[real]
    assert (padded[real] - expected).norm() <= probe.LIMIT * expected.norm()


@pytest.mark.parametrize("name", LEFT)
def test_a_model_that_would_not_is_left_with_the_reason(name):
    model = LEFT[name]().eval()
    before, own = outputs(model), model.config._attn_implementation
    report = gk.fuse(model, gauge=False)
    assert report["attention"] == own and type(model).__name__ in report["left"][0]["reason"]
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("name", ["bloom", "falcon", "llama"])
def test_loading_packed_asks_the_same(name, tmp_path):
    (TAKEN | LEFT)[name]().save_pretrained(tmp_path)
    kind = type((TAKEN | LEFT)[name]())
    plain = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    packed = kind.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=GaugekitConfig(packed=True)
    ).eval()
    assert (packed.config._attn_implementation == "gaugekit") == (name in TAKEN)
    reference = outputs(plain.double())
    noise = (outputs(plain.bfloat16()).double() - reference).norm()
    assert (outputs(packed).double() - reference).norm() <= 2 * noise
    asked = kind.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        quantization_config=GaugekitConfig(packed=True),
    )
    assert asked.config._attn_implementation == "eager"


def test_asking_leaves_no_trace():
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    probe._verdicts.clear()
    assert probe.verdict(tr.LlamaForCausalLM, config := tr.LlamaConfig(**GROUPS)) is None
    assert len(probe._verdicts) == 1 and probe.verdict(tr.LlamaForCausalLM, config) is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert config.vocab_size == 99 and config.num_hidden_layers == 2


def test_a_large_config_is_tried_small():
    """Sizes of published models: only narrow twins are ever made of them."""
    mistral = tr.MistralConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
    assert probe.verdict(tr.MistralForCausalLM, mistral) is None


def test_parts_keep_their_own_implementations():
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = tr.LlavaConfig(
        text_config=tr.LlamaConfig(**GROUPS), vision_config=tr.CLIPVisionConfig(**vision, image_size=64)
    )
    model = tr.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager"})
    before = outputs(model)
    assert gk.fuse(model, gauge=False)["attention"] == "gaugekit"
    assert config.vision_config._attn_implementation == "gaugekit"
    assert (outputs(model) - before).norm() <= probe.LIMIT * before.norm()
    gk.unfuse(model)
    own = [part._attn_implementation for part in (config, config.text_config, config.vision_config)]
    assert own == ["sdpa", "sdpa", "eager"]
