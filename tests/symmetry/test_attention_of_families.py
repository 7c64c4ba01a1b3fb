"""Every group of an attention layer in every kind of family it applies to, on transformers' own tiny models."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gaugekit.models import Live  # noqa: E402
from gaugekit.symmetry import SYMMETRIES, count  # noqa: E402
from sliceable import Norm  # noqa: E402

SIZES = dict(
    vocab_size=40, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
)  # fmt: skip
SQUARE = {**{name: size for name, size in SIZES.items() if name != "head_dim"}, "hidden_size": 32}
PHI = {name: size for name, size in SQUARE.items() if name != "num_key_value_heads"}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
HALF = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
# name: (model, config, sizes, what a layer of heads of width 8 has beside value_output): two key/value heads, but four
# in Phi and GPT-J
FAMILIES = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig", {**SIZES, "attention_bias": True}, {"value_bias": 16, "rotary_pairs": 16}
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES, {"rotary_pairs": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SQUARE, {"rotary_pairs": 16}),
    "stablelm": (
        "StableLmForCausalLM", "StableLmConfig", {**SQUARE, **HALF, "use_qkv_bias": True},
        {"rotary_pairs": 8, "plain_query_key": 32, "plain_key_bias": 8},
    ),
    "phi": (
        "PhiForCausalLM", "PhiConfig", {**PHI, **HALF},
        {"value_bias": 32, "rotary_pairs": 16, "plain_query_key": 64, "plain_key_bias": 16},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", SQUARE, {"rotary_pairs": 16}),
    "gptj": (
        "GPTJForCausalLM", "GPTJConfig",
        dict(vocab_size=40, n_embd=32, n_head=4, n_layer=2, n_positions=16, rotary_dim=4),
        {"rotary_pairs": 16, "plain_query_key": 64},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, "query_pre_attn_scalar": 8}, {"rotary_pairs": 16}),
    "cohere with norms": (
        "CohereForCausalLM", "CohereConfig", {**SQUARE, "use_qk_norm": True},
        {"query_key_gains": 8, "query_key_means": 6 * 32},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES, {"query_key_gains": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, "query_pre_attn_scalar": 8}, {"query_key_gains": 4}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SQUARE, {"query_key_gains": 8}),
    "stablelm with norms": (
        "StableLmForCausalLM", "StableLmConfig", {**SQUARE, **HALF, "qk_layernorm": True},
        {"query_key_gains": 12, "query_key_means": 6 * 32},
    ),
}  # fmt: skip
EQUAL = (
    "qwen3",
    "gemma3",
    "olmo2",
)  # with gains that agree channels turn: four pairs in each of two key heads
ACTING = [(family, group) for family in FAMILIES for group in ("value_output", *FAMILIES[family][3])]
ACTING += [(family, "query_key_turns") for family in EQUAL]


class OffsetNorm(Norm):
    """Gemma's norm in the dtype of its input."""

    def __init__(self, norm):
        torch.nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class CentredNorm(Norm):
    """Cohere's norm in the dtype of its input."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


def bound(family):
    """Cohere, and GPT-J before transformers 5.24, turn queries and keys in float32, whatever the model's dtype."""
    return 1e-6 if family.startswith(("cohere", "gptj")) else 1e-12


def build(family, equal=False):
    kind, config, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.add_(
                0.2 * torch.randn_like(parameter)
            )
            if equal and path.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(0.7)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "CohereLayerNorm":
            model.set_submodule(path, CentredNorm(module))
        elif hasattr(module, "variance_epsilon"):
            model.set_submodule(path, Norm(module))
        elif type(module).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm"):
            model.set_submodule(path, OffsetNorm(module))
    return model.double().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 17, 33, 3, 29, 11, 8], [4, 39, 6, 21, 21, 13, 7]])).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_by_hand(family):
    view = Live(build(family)).attention(1)
    counts = {group: size for group, size in count(view).items() if size}
    assert counts == {"value_output": 64 * view.groups, **FAMILIES[family][3]}
    if family in EQUAL:
        assert count(Live(build(family, equal=True)).attention(1))["query_key_turns"] == 8


@pytest.mark.parametrize("family, group", ACTING)
def test_a_random_element_leaves_the_logits_unchanged(family, group):
    model, symmetry = build(family, group == "query_key_turns"), SYMMETRIES[group]
    live, before = Live(model), logits(model)
    view = live.attention(1)
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(1)))
    live.write(live.family.store(1, moved).tensors)
    assert (logits(model) - before).norm() <= bound(family) * before.norm()
    read = live.attention(1)
    assert symmetry.contains(view, read)
    fixed = symmetry.fix(read)
    live.write(live.family.store(1, fixed).tensors)
    assert (logits(model) - before).norm() <= bound(family) * before.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_element_of_the_general_linear_group_does_not(family):
    """Where queries and keys turn or are normalised, no other matrix passes between them."""
    model = build(family)
    live, before = Live(model), logits(model)
    view = live.attention(1)
    matrix = SYMMETRIES["value_output"].random(view, torch.Generator().manual_seed(1))
    moved = type(view.q)(view.q.weight @ matrix.repeat_interleave(view.repeats, 0), view.q.bias)
    inverse = type(view.k)(view.k.weight @ torch.linalg.inv(matrix).mT, view.k.bias)
    outside = type(view)(**{**vars(view), "q": moved, "k": inverse})
    live.write(live.family.store(1, outside).tensors)
    assert (logits(model) - before).norm() > 1e-3 * before.norm()
    for name, symmetry in SYMMETRIES.items():
        assert not symmetry.contains(view, outside), name


@pytest.mark.parametrize("family", (*EQUAL, "stablelm with norms", "cohere with norms"))
def test_gains_are_stored_as_they_were_read(family):
    live = Live(build(family))
    view = live.attention(0)
    stored = live.family.store(0, view).tensors
    gains = [name for name in stored if "norm" in name]
    assert len(gains) == (6 if "stablelm" in family else 2)
    assert all(torch.equal(stored[name], live.read(name)) for name in gains)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == live.family.shapes(0)
