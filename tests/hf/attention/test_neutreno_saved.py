"""λ of a fused model goes with its files: save_pretrained writes it, from_pretrained fuses again."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import gaugekit as gk
import gaugekit.integrations.transformers

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=90, pad_token_id=0
)  # fmt: skip
MODELS = {
    "bert": (AutoModel, lambda: BertModel(BertConfig(**SIZES, attention_probs_dropout_prob=0.0))),
    "llama": (AutoModelForCausalLM, lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))),
}


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("lam", [0.6, [0.0, 0.3, 0.9]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_lambda_is_saved_and_restored(name, lam, tmp_path):
    auto, make = MODELS[name]
    model, ids = make().eval(), torch.randint(3, 90, (2, 9))
    plain = run(model, ids)
    gk.fuse(model, neutreno=lam)
    fused = run(model, ids)
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["neutreno"] == lam
    loaded = auto.from_pretrained(tmp_path / "a")
    assert torch.equal(run(loaded, ids), fused)
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(run(auto.from_pretrained(tmp_path / "b"), ids), fused)
    gk.unfuse(loaded)
    loaded.set_attn_implementation("sdpa")
    gk.unfuse(model)
    assert torch.equal(run(loaded, ids), run(model, ids))
    assert torch.equal(run(model, ids), plain) and not hasattr(model.config, "quantization_config")
    for left in (model, loaded):
        left.save_pretrained(tmp_path / "c")
        assert "neutreno" not in (tmp_path / "c" / "config.json").read_text()


def test_what_cannot_be_restored_is_said(tmp_path):
    model = MODELS["bert"][1]()
    gk.fuse(model, neutreno=0.6)
    model.config.quantization_config["neutreno"] = [0.1, 0.2]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neutreno: expected 3 numbers, one a layer, got 2"):
        AutoModel.from_pretrained(tmp_path)
    other = MODELS["bert"][1]()
    other.config.quantization_config = {"quant_method": "gptq"}
    left = gk.fuse(other, neutreno=0.6)["left"]
    assert "will not be saved" in left[0]["reason"]
    gk.unfuse(other)
    assert other.config.quantization_config == {"quant_method": "gptq"}
