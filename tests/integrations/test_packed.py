"""Whole models with packed weights: logits, greedy tokens, tied heads, and all matrices of MiniLM."""

import pytest
import torch

from helpers import minilm

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit.integrations.packing import load_packed  # noqa: E402
from gaugekit.integrations.transformers import GaugekitConfig  # noqa: E402
from gaugekit.nn import PackedEmbedding, PackedLinear  # noqa: E402

SIZES = dict(vocab_size=300, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
IDS = torch.arange(24).view(2, 12)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "llama tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    ),
    "qwen": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    ),
}


def made(name):
    return MODELS[name]().bfloat16().eval()


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=GaugekitConfig(packed=True), attn_implementation="sdpa", **options
    ).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def greedy(model, ids=IDS[:1]):
    return model.generate(
        ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained(name, tmp_path):
    plain = made(name)
    plain.save_pretrained(tmp_path / "m")
    packed = load(tmp_path / "m")
    kinds = {type(module) for module in packed.modules()}
    assert torch.nn.Linear not in kinds and torch.nn.Embedding not in kinds
    assert isinstance(packed.model.embed_tokens, PackedEmbedding) and isinstance(packed.lm_head, PackedLinear)
    assert (packed.lm_head.packed is packed.model.embed_tokens.packed) == plain.config.tie_word_embeddings
    reference = logits(made_double(plain))
    noise = (logits(plain).double() - reference).norm()
    assert (logits(packed).double() - reference).norm() <= 1.2 * noise
    assert torch.equal(greedy(packed), greedy(plain))
    with pytest.raises(ValueError, match="serializable"):
        packed.save_pretrained(tmp_path / "out")


def made_double(model):
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_heads_that_only_claim_to_be_tied_stay_apart(tmp_path):
    from safetensors.torch import load_file, save_file

    made("llama tied").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(state, file, {"format": "pt"})
    packed = load(tmp_path / "m")
    assert torch.equal(packed.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(packed.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_dtype_given_at_loading_packs_the_cast_weights(tmp_path):
    plain = MODELS["llama"]().eval()
    plain.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"dtype: expected torch.bfloat16 or torch.float16"):
        load(tmp_path / "m")
    packed = load(tmp_path / "m", dtype=torch.float16)
    assert torch.equal(packed.lm_head.weight, plain.lm_head.weight.half())


def test_config_refuses_modules_beside_packed():
    with pytest.raises(ValueError, match="either modules or packed"):
        GaugekitConfig(packed=True, modules={"a": {}})


def test_fuse_and_unfuse():
    model = made("qwen")
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    reference = logits(made_double(model))
    report = gk.fuse(model, packed=True, attention=False)
    assert report["bytes_after"] < 0.8 * report["bytes_before"] and not report["left"]
    assert report["parameters_after"] == report["parameters_before"]
    assert {one["form"] for one in report["replaced"]} == {"packed_linear", "packed_embedding"}
    assert (logits(model).double() - reference).norm() <= 1.2 * (expected.double() - reference).norm()
    with pytest.raises(ValueError, match="save_pretrained: .* gaugekit.unfuse"):
        model.save_pretrained("nowhere")
    gk.unfuse(model)
    assert "save_pretrained" not in vars(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="gauge, packed"):
        gk.fuse(model, gauge=True, packed=True)


def test_gpt2_with_its_transposed_layers(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_embd=128, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).bfloat16().eval()
    model.save_pretrained(tmp_path)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    reference = logits(made_double(model))
    report = gk.fuse(model, packed=True, attention=False)
    kinds = {type(module).__name__ for module in model.modules()}
    assert not report["left"] and not kinds & {"Conv1D", "Linear", "Embedding"}
    found = logits(model)
    assert (found.double() - reference).norm() <= 1.2 * (expected.double() - reference).norm()
    for other in (load(tmp_path, dtype=torch.bfloat16), load_packed(tmp_path)):
        assert "Conv1D" not in {type(module).__name__ for module in other.modules()}
        assert torch.equal(logits(other), found)
    gk.unfuse(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(model), expected) and model.lm_head.weight is model.transformer.wte.weight


def test_fuse_leaves_float32_and_says_so():
    model = MODELS["llama"]()
    report = gk.fuse(model, packed=True, attention=False)
    assert not report["replaced"] and "torch.float32" in report["left"][0]["reason"]


@minilm
def test_minilm():
    """All matrices of MiniLM in bfloat16: at most 0.71 of their memory, embeddings within verify's terms."""
    directory = gk.samples.minilm()
    plain = transformers.AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
    packed = transformers.AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval()
    report = gk.fuse(packed, packed=True, attention=False)
    assert report["bytes_after"] <= 0.71 * report["bytes_before"]
    ids = torch.randint(0, 30000, (4, 30))
    with torch.no_grad():
        ours, theirs, exact = (m(ids)[0].double() for m in (packed, plain, made_double(plain)))
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
