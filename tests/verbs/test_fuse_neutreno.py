"""``fuse(model, neutreno=λ)`` on small random models of each family, against the equation written out by hand."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.masking_utils import eager_mask

import gaugekit as gk
from helpers import assert_accurate

T, LAYERS = 10, 3
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
TEXT = SIZES | dict(vocab_size=90, pad_token_id=0)
IMAGE = SIZES | dict(image_size=12, patch_size=4, num_channels=1)
GPT2 = dict(
    n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=90, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0
)
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGE)),
    "deit": lambda: DeiTModel(DeiTConfig(**IMAGE)),
    "bert": lambda: BertModel(BertConfig(**TEXT, attention_probs_dropout_prob=0.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=2)),
    "roberta": lambda: RobertaModel(RobertaConfig(**TEXT, attention_probs_dropout_prob=0.0)),
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2")
PADDING = {
    "none": None,
    "right": torch.tensor([[1] * n + [0] * (T - n) for n in (T, 7, 2)]),
    "left": torch.tensor([[0] * (T - n) + [1] * n for n in (T, 7, 2)]),
}


def make(name, dtype=torch.float64):
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # so that attention is peaked and tokens differ
    return model


def inputs(name, padding="none", dtype=torch.float64):
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(3, 1, 12, 12, dtype=dtype)}
    mask = PADDING[padding]
    found = {"input_ids": torch.randint(3, 90, (3, T))}
    if mask is not None:
        found["attention_mask"] = mask
        if name in CAUSAL:
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return found


class Hand:
    """transformers' eager attention, in the tensors' own dtype, plus λ (V⁰ − V) written out above the first layer."""

    def __init__(self, lam):
        self.lam, self.first, self.v0, self.layer = lam, None, None, 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :, : key.shape[2]]
        out = scores.softmax(-1) @ value
        if self.first in (None, module):
            self.first, self.v0, self.layer = module, value, 0
        else:
            self.layer += 1
            lam = self.lam if isinstance(self.lam, float) else self.lam[self.layer]
            out = out + lam * (self.v0 - value)
        return out.transpose(1, 2).contiguous(), None


def by_hand(model, lam, **given):
    gk.unfuse(model)
    AttentionInterface.register("by_hand", Hand(lam))
    AttentionMaskInterface.register("by_hand", eager_mask)
    model.set_attn_implementation("by_hand")
    return output(model, **given)


def output(model, **given):
    with torch.no_grad():
        out = model(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


CASES = [
    (name, padding)
    for name in MODELS
    for padding in PADDING
    if padding == "none" or name not in ("vit", "deit")
]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_it_equals_the_equation_by_hand(name, padding):
    model, given = make(name), inputs(name, padding)
    for lam in (0.6, [0.0, 0.3, 0.9]):
        expected = by_hand(copy.deepcopy(model), lam, **given)
        fused = copy.deepcopy(model)
        report = gk.fuse(fused, neutreno=lam)
        assert report["attention"] == "gaugekit" and not report["left"] and not report["replaced"]
        found = output(fused, **given)
        if PADDING[padding] is not None:
            real = PADDING[padding].bool()
            found, expected = found[real], expected[real]
        assert_accurate(found, expected, expected, ulps=1000)


@pytest.mark.parametrize("name", MODELS)
def test_lambda_zero_changes_nothing_and_unfuse_restores(name):
    model = make(name, torch.float32)
    given = inputs(name, dtype=torch.float32)
    before, attributes = output(model, **given), {n for n, _ in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    gk.fuse(model, gauge=False)
    plain = output(model, **given)
    gk.unfuse(model)
    gk.fuse(model, neutreno=0.0)
    assert torch.equal(output(model, **given), plain)
    double = copy.deepcopy(model).double()
    gk.unfuse(double)
    cast = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    assert_accurate(plain, output(double, **cast), before)
    gk.unfuse(model)
    gk.fuse(model, neutreno=0.6)
    assert not torch.equal(output(model, **given), before)
    gk.unfuse(model)
    assert torch.equal(output(model, **given), before)
    assert {n for n, _ in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


GENERATE = [(name, padding, {}) for name in CAUSAL[:3] for padding in ("none", "left")]
GENERATE += [
    (name, "left", how)
    for name in CAUSAL[:3]
    for how in ({"num_beams": 2}, {"cache_implementation": "static"})
]


@pytest.mark.parametrize(("name", "padding", "options"), GENERATE, ids=str)
def test_generate_with_a_cache_gives_the_tokens_of_whole_forwards(name, padding, options):
    model = make(name)
    gk.fuse(model, neutreno=0.6)
    given = inputs(name, padding)
    given.pop("position_ids", None)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(**given, **settings, **options)
    beams = {"num_beams": options.get("num_beams", 1)}
    assert torch.equal(found, model.generate(**given, **settings, **beams, use_cache=False))
    if options:
        return
    whole, mask = given["input_ids"], given.get("attention_mask", torch.ones(3, T, dtype=torch.int64))
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs_of_step = dict(input_ids=whole, attention_mask=mask, position_ids=positions)
        logits = by_hand(copy.deepcopy(model), 0.6, **inputs_of_step)
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_gradient_checkpointing_changes_no_gradient(name):
    plain = make(name, torch.float32).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gk.fuse(plain, neutreno=0.6)
    saving = copy.deepcopy(plain)
    given = inputs(name, dtype=torch.float32)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, saving):
        out = model(**given)
        (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().sum().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


def test_reentrant_checkpointing_is_refused():
    model = make("llama", torch.float32).train()
    gk.fuse(model, neutreno=0.6)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant: expected False"):
        model(**inputs("llama")).logits.sum().backward()


def test_it_compiles():
    torch._dynamo.reset()
    model, given = make("gpt2", torch.float32), inputs("gpt2")
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    gk.fuse(model, neutreno=0.6)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        found = compiled(**given, use_cache=False).logits
    assert counter.frame_count
    torch.testing.assert_close(found, output(model, **given, use_cache=False))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_energies_of_a_fused_model_leave_padding_out(name):
    """Left padding, right padding and none: the same energies of the same tokens."""
    model = make(name, torch.float32)
    gk.fuse(model, neutreno=0.6)
    regularizer = gk.nn.NonlocalRegularizer(model)
    ids, found = torch.randint(3, 90, (1, 7)), []
    for left, right in ((0, 0), (3, 0), (0, 3)):
        row = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False)
        found.append(torch.stack(list(regularizer.energies.values())).detach())
    assert found[0].shape == (LAYERS, 1, 4)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    (regularizer() * 2).backward()
    regularizer.remove()
    gk.unfuse(model)


def test_what_does_not_fit():
    model = make("bert")
    with pytest.raises(ValueError, match="neutreno: expected with attention and without gauge"):
        gk.fuse(model, neutreno=0.6, gauge=True)
    for wrong in ("0.6", float("nan"), [0.1, True, 0.2]):
        with pytest.raises(ValueError, match="neutreno: expected a finite number or one a layer"):
            gk.fuse(model, neutreno=wrong)
    with pytest.raises(ValueError, match="neutreno: expected 3 numbers, one a layer, got 2"):
        gk.fuse(model, neutreno=[0.1, 0.2])
    assert model.config._attn_implementation != "gaugekit"
    decoder = BertModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    report = gk.fuse(decoder, neutreno=0.6)
    assert "cross-attention" in report["left"][0]["reason"] and not gk.unfuse(decoder)["restored"]
    gk.fuse(model, neutreno=0.6)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="is attn_implementation still 'gaugekit'"):
        model(**inputs("bert"))
