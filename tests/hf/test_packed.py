"""Whole models with packed weights: logits, greedy tokens, tied heads, and all matrices of MiniLM."""

import copy
import threading

import pytest
import torch

from helpers import minilm

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit.hf.quantizer import GaugekitConfig  # noqa: E402
from gaugekit.integrations.packing import load_packed  # noqa: E402
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
    assert saves_as(packed, plain, tmp_path / "out")


def saves_as(packed, plain, path):
    """Whether ``packed`` saves a plain checkpoint that loads as ``plain``, ties and all."""
    packed.save_pretrained(path)
    again, info = type(plain).from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "quantization_config" not in (path / "config.json").read_text()
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ours, theirs = again.state_dict(), plain.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


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


def test_fuse_and_unfuse(tmp_path):
    model = made("qwen")
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    reference = logits(made_double(model))
    report = gk.fuse(model, packed=True, attention=False)
    assert report["bytes_after"] < 0.8 * report["bytes_before"] and not report["left"]
    assert report["parameters_after"] == report["parameters_before"]
    assert {one["form"] for one in report["replaced"]} == {"packed_linear", "packed_embedding"}
    assert (logits(model).double() - reference).norm() <= 1.2 * (expected.double() - reference).norm()
    assert saves_as(model, copy.deepcopy(model), tmp_path / "whole")
    assert saves_as(model.model, model.model, tmp_path / "base")
    gk.unfuse(model)
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


SMALL = dict(
    vocab_size=99, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)
SEQ2SEQ = dict(vocab_size=99, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
               decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128)  # fmt: skip
FAMILIES = {
    "BertForMaskedLM": SMALL,
    "BertModel": SMALL,
    "RobertaForMaskedLM": SMALL,
    "DebertaV2ForMaskedLM": SMALL,
    "GPTNeoXForCausalLM": SMALL,
    "GemmaForCausalLM": SMALL | {"num_key_value_heads": 2, "head_dim": 32},
    "MixtralForCausalLM": SMALL | {"num_key_value_heads": 2, "num_local_experts": 2},
    "BartForConditionalGeneration": SEQ2SEQ,
    "T5ForConditionalGeneration": dict(
        vocab_size=99, d_model=128, d_kv=32, d_ff=128, num_layers=1, num_heads=4
    ),
    "WhisperModel": SEQ2SEQ | {"pad_token_id": 0, "max_source_positions": 20},
    "CLIPModel": {
        "text_config": SMALL,
        "vision_config": SMALL | {"image_size": 16, "patch_size": 8},
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_load_packed_reads_what_from_pretrained_reads(name, tmp_path):
    """Tied heads and biases, names that transformers changes on the way, subclasses, experts, shards."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind._from_config(kind.config_class(**FAMILIES[name]), dtype=torch.bfloat16).save_pretrained(
        tmp_path / "m", max_shard_size="100KB"
    )
    plain = kind.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    packed = load_packed(tmp_path / "m")
    assert not packed.training and any(isinstance(module, PackedLinear) for module in packed.modules())
    state, expected = packed.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    buffers = dict(packed.named_buffers())
    assert all(torch.equal(buffers[n], buffer) for n, buffer in plain.named_buffers())
    assert saves_as(packed, plain, tmp_path / "again")
    gk.unfuse(packed)
    assert [n for n, _ in packed.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in packed.parameters()) and packed.dtype == plain.dtype


def test_load_packed_reads_legacy_names_and_a_missing_pooler(tmp_path):
    from safetensors.torch import load_file, save_file

    config = transformers.BertConfig(**SMALL)
    plain = transformers.BertModel._from_config(config, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in legacy.items():
            name = name.replace(new, old)
        if not name.startswith("pooler."):
            renamed["bert." + name] = tensor
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    packed = load_packed(tmp_path)
    assert all(
        torch.equal(t, state[n]) for n, t in packed.state_dict().items() if not n.startswith("pooler.")
    )
    assert type(packed.pooler.dense) is torch.nn.Linear


def test_loading_in_threads_leaves_the_process_as_it_was(tmp_path):
    made("llama").save_pretrained(tmp_path)
    switches = transformers.utils.logging
    before = (
        switches.get_verbosity(),
        switches.is_progress_bar_enabled(),
        torch.nn.Module.register_parameter,
    )
    loaded, wrong, done = [], [], threading.Event()

    def build():
        while not done.is_set():
            weight = torch.nn.Linear(4, 4).weight
            if weight.is_meta or not weight.requires_grad:
                wrong.append(weight)

    builder = threading.Thread(target=build)
    builder.start()
    threads = [threading.Thread(target=lambda: loaded.append(load_packed(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    builder.join()
    assert not wrong and len(loaded) == 3
    assert all(torch.equal(logits(model), logits(loaded[0])) for model in loaded)
    after = (switches.get_verbosity(), switches.is_progress_bar_enabled(), torch.nn.Module.register_parameter)
    assert after == before and torch.get_default_dtype() == torch.float32


def test_the_bare_skeleton_has_the_buffers_of_the_model(tmp_path):
    from gaugekit.hf import loading

    plain = made("llama")
    plain.save_pretrained(tmp_path)
    bare = loading.skeleton(tmp_path, torch.bfloat16)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in bare.parameters())
    expected = dict(transformers.LlamaForCausalLM.from_pretrained(tmp_path).named_buffers())
    assert expected and all(torch.equal(buffer, expected[name]) for name, buffer in bare.named_buffers())


def test_what_stays_plain_beside_experts_is_named():
    config = transformers.MixtralConfig(**FAMILIES["MixtralForCausalLM"])
    model = transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    report = gk.fuse(model, packed=True, attention=False)
    left = {one["module"]: one["reason"] for one in report["left"]}
    plain = {
        n.rpartition(".")[0]
        for n, p in model.named_parameters()
        if p.dim() > 1 and type(p) is torch.nn.Parameter
    }
    assert left.keys() == plain and "MixtralTopKRouter" in left["model.layers.0.mlp.gate"]
    assert any("layers.0.mlp.gate" in note for note in report.notes)


def test_what_peft_does_acts_or_is_refused(tmp_path):
    """The way PEFT merges: in place, or by assignment after a check."""
    model = made("llama")
    gk.fuse(model, packed=True, attention=False)
    layer = model.model.layers[0].self_attn.q_proj
    delta = torch.ones_like(layer.weight)
    merged = layer.weight.data.clone() + delta
    with pytest.raises(RuntimeError, match=r"gaugekit\.unfuse"):
        layer.weight.data += delta
    layer.weight.data = merged
    gk.unfuse(model)
    assert torch.equal(layer.weight, merged)


def test_fuse_leaves_float32_and_says_so():
    model = MODELS["llama"]()
    report = gk.fuse(model, packed=True, attention=False)
    assert not report["replaced"] and "torch.float32" in report["left"][0]["reason"]
    assert report.notes[0].startswith("nothing was packed: packing takes bfloat16 and float16")
    assert "float32; model.to(torch.bfloat16) first" in report.notes[0] and report.notes[0] in str(report)
    assert len(report.notes) < len(report["left"]), "one sentence a reason, not one a layer"


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_parameters_are_counted_as_of_the_plain_model(name):
    model = made(name)
    plain = [model.num_parameters(exclude_embeddings=without) for without in (False, True)]
    gk.fuse(model, packed=True, attention=False)
    assert [model.num_parameters(exclude_embeddings=without) for without in (False, True)] == plain
    assert plain[1] < plain[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trained < plain[0], "packed weights are frozen"


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
