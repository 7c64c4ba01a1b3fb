"""A converted checkpoint loads through from_pretrained as any other does."""

import json
import subprocess

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import gaugekit.integrations.transformers as integration  # noqa: E402
from gaugekit.nn import Concat, GaugeProjection  # noqa: E402
from gaugekit.symmetry import GaugeFix  # noqa: E402
from gaugekit.verbs.convert import convert  # noqa: E402
from warm import python  # noqa: E402

TOKENS = torch.arange(22).reshape(2, 11)


def scatter(model):
    """Random weights everywhere: fresh biases are zero and would hide errors."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def bert(kind="BertModel"):
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    return scatter(getattr(transformers, kind)(transformers.BertConfig(**sizes, intermediate_size=32)))


def gpt2(kind="GPT2LMHeadModel"):
    sizes = {"vocab_size": 60, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32}
    return scatter(getattr(transformers, kind)(transformers.GPT2Config(**sizes)))


def converted(model, tmp_path, **arguments):
    model.save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", [GaugeFix()], **arguments)
    return tmp_path / "out"


def load(path, auto="AutoModel", **arguments):
    model, info = getattr(transformers, auto).from_pretrained(path, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    return model


def output(model):
    return model(TOKENS)[0]


def assert_same(model, original):
    """Equal up to a few roundings of float32, the dtype both are stored in."""
    model, original = model.double(), original.double()
    assert (output(model) - output(original)).norm() < 1e-6 * output(original).norm()


@pytest.mark.parametrize(
    ("made", "auto"),
    [
        (lambda: bert(), "AutoModel"),
        (lambda: bert("BertForMaskedLM"), "AutoModelForMaskedLM"),
        (lambda: gpt2(), "AutoModelForCausalLM"),
        (lambda: gpt2("GPT2Model"), "AutoModel"),
    ],
)
def test_loads(made, auto, tmp_path):
    original = made()
    model = load(converted(original, tmp_path), auto)
    forms = [module for module in model.modules() if isinstance(module, GaugeProjection)]
    assert len(forms) == 4
    assert all(bool(form.rows.max() > 7) for form in forms), "row sets must come from the file"
    assert model.num_parameters() == original.num_parameters() - 2 * (2 * 3 * 64 + 2 * 24)
    assert model.config._attn_implementation == "gaugekit"
    assert not model.training
    assert_same(model, original)


def test_a_base_checkpoint_into_a_model_with_a_head_and_back(tmp_path):
    original = gpt2("GPT2Model")
    head = load(converted(original, tmp_path / "a"), "AutoModelForCausalLM")
    assert isinstance(head.transformer.h[0].attn.c_attn, Concat)
    assert_same(head.transformer, original)
    original = bert("BertForMaskedLM")
    path = converted(original, tmp_path / "b")
    base = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    assert isinstance(base.encoder.layer[1].attention.self.key, GaugeProjection)
    assert_same(base, original.bert)


def test_a_tied_head_stays_tied(tmp_path):
    model = load(converted(gpt2(), tmp_path), "AutoModelForCausalLM")
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("made", [bert, gpt2])
def test_save_pretrained_round_trips(made, tmp_path):
    auto = "AutoModel" if made is bert else "AutoModelForCausalLM"
    model = load(converted(made(), tmp_path), auto)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", auto)
    assert torch.equal(output(again), output(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"])
def test_dtype_is_honoured(dtype, tmp_path):
    model = load(converted(bert(), tmp_path), dtype=dtype)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.float32 if dtype == "auto" else dtype}
    assert model.encoder.layer[0].attention.self.key.rows.dtype == torch.int32
    output(model)
    assert model.half().dtype == torch.float16


def test_the_attention_asked_for_is_the_one_used(tmp_path):
    path = converted(bert(), tmp_path)
    for name in ("eager", "sdpa", "gaugekit"):
        assert load(path, attn_implementation=name).config._attn_implementation == name


def test_dense_needs_no_gaugekit(tmp_path):
    path = converted(gpt2(), tmp_path, dense=True)
    torch.save(output(load(path, "AutoModelForCausalLM")), tmp_path / "expected")
    code = (
        "import sys, torch, transformers; path, expected = sys.argv[1:];"
        "model = transformers.AutoModelForCausalLM.from_pretrained(path);"
        "assert torch.equal(model(torch.arange(22).reshape(2, 11))[0], torch.load(expected));"
        "assert 'gaugekit' not in sys.modules"
    )
    subprocess.run([*python(), "-W", "ignore", "-c", code, str(path), str(tmp_path / "expected")], check=True)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("made", [bert, gpt2])
def test_float64_is_exact(made, dense, tmp_path):
    original = made().double()
    path = converted(original, tmp_path, dense=dense)
    model = load(path, "AutoModel" if made is bert else "AutoModelForCausalLM", dtype=torch.float64)
    assert (output(model) - output(original)).norm() <= 1e-12 * output(original).norm()


def test_masks_in_old_files_pass_through_and_count_for_nothing(tmp_path):
    original = gpt2()
    original.save_pretrained(tmp_path / "m")
    tensors = safetensors_torch.load_file(tmp_path / "m" / "model.safetensors")
    tensors |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    safetensors_torch.save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    report = convert(tmp_path / "m", tmp_path / "out", [GaugeFix()])
    assert report["parameters_before"] == original.num_parameters()
    assert report["parameters_before"] - report["parameters_after"] == report["steps"][0]["removed"]["total"]
    assert_same(load(tmp_path / "out", "AutoModelForCausalLM"), original)


def test_greedy_tokens_stay_equal(tmp_path):
    original = gpt2()
    arguments = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(TOKENS),
    }
    expected = original.generate(TOKENS, **arguments)
    for dense in (False, True):
        model = load(converted(original, tmp_path / str(dense), dense=dense), "AutoModelForCausalLM")
        assert torch.equal(model.generate(TOKENS, **arguments), expected)


def test_it_trains(tmp_path):
    """Every parameter has a gradient; those outside attention have the original's, as the loss is the same function."""
    original = gpt2()
    model = load(converted(original, tmp_path), "AutoModelForCausalLM", attn_implementation="sdpa").eval()
    for one in (model, original):
        one.double()(TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.count_nonzero() > 0 for gradient in gradients.values())
    shared = [name for name, _ in original.named_parameters() if ".attn." not in name]
    assert len(shared) > 10
    for name in shared:
        expected = original.get_parameter(name).grad
        assert (gradients[name] - expected).norm() < 1e-5 * expected.norm(), name  # stored in float32 both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 1, got 2"),
        ({"modules": ["a"]}, "expected modules by name"),
        ({"bits": 4}, "got bits too"),
        (
            {"modules": {"encoder.layer.0.attention.self.key": {"form": "ternary", "arguments": {}}}},
            "got 'ternary'",
        ),
        (
            {"modules": {"encoder.layer.9.attention.self.key": {"form": "linear", "arguments": {}}}},
            "layer.9.*got none",
        ),
    ],
)
def test_what_this_version_does_not_know_is_named(change, message, tmp_path):
    path = converted(bert(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(path)


def test_the_config_object():
    config = integration.GaugekitConfig(version=1, modules={})
    assert config.to_dict() == {"quant_method": "gaugekit", "version": 1, "modules": {}}
