"""Groups of a whole model, on models of transformers: logits stay, what is outside moves them, and none is missing."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gaugekit.models import Live  # noqa: E402
from gaugekit.symmetry import STREAM_SYMMETRIES, SYMMETRIES, put_stream, stream_of  # noqa: E402
from jacobian import nullity  # noqa: E402
from sliceable import exact  # noqa: E402

SHARED = dict(vocab_size=11, bos_token_id=0, eos_token_id=1, pad_token_id=None, num_hidden_layers=1)
LLAMA = dict(
    SHARED, hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2, intermediate_size=3,
    rope_parameters={"rope_type": "default", "rope_theta": 10.0},
)  # fmt: skip
GPT2 = dict(
    vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, n_inner=3, bos_token_id=0, eos_token_id=1
)
OPT = dict(
    SHARED, hidden_size=4, num_attention_heads=2, ffn_dim=3, word_embed_proj_dim=4, max_position_embeddings=6
)
PHI = dict(
    {**SHARED, "vocab_size": 23}, hidden_size=4, num_attention_heads=2, intermediate_size=3, max_position_embeddings=8,
    rope_parameters={"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 1.0},
)  # fmt: skip
# name: (family, changes, the groups of the model by hand: D = 4, V = 11, six positions, three hidden units)
ATTENTION = {"value_output": 8, "query_key": 8, "key_bias": 4, "value_bias": 4}
MODELS = {
    "llama": (
        "Llama", LLAMA,
        {"value_output": 4, "rotary_pairs": 2, "norm_gains": 12, "stream_rotation": 6, "neuron_scales": 3},
    ),
    "llama, tied": (
        "Llama", {**LLAMA, "tie_word_embeddings": True},
        {"value_output": 4, "rotary_pairs": 2, "norm_gains": 8, "neuron_scales": 3},
    ),
    "llama, relu": (
        "Llama", {**LLAMA, "hidden_act": "relu"},
        {"value_output": 4, "rotary_pairs": 2, "norm_gains": 12, "stream_rotation": 6, "neuron_scales": 6},
    ),
    "qwen3": (
        "Qwen3", LLAMA,
        {"value_output": 4, "query_key_gains": 1, "norm_gains": 12, "stream_rotation": 6, "neuron_scales": 3},
    ),
    "gpt2": (
        "GPT2", GPT2,
        # means: 6 positions; 5 rows write in attention, 4 in the MLP; 12 read in attention, 3 in the MLP
        {**ATTENTION, "norm_gains": 8, "norm_biases": 8, "stream_means": 6 + 5 + 4 + 12 + 3},
    ),
    "gpt2, untied": (
        "GPT2", {**GPT2, "tie_word_embeddings": False},
        {**ATTENTION, "norm_gains": 12, "norm_biases": 8, "stream_means": 30 + 11, "stream_offsets": 3,
         "stream_rotation": 3},
    ),
    "opt": (
        "OPT", OPT,  # its table of positions has two rows more
        {**ATTENTION, "norm_gains": 8, "norm_biases": 8, "stream_means": 32, "neuron_scales": 3},
    ),
    "phi": (
        "Phi", PHI,
        # means: 23 tokens; 5 and 4 rows write; 12, 3 and the 23 of the head read
        {"value_output": 8, "value_bias": 4, "rotary_pairs": 4, "norm_gains": 8, "norm_biases": 8,
         "stream_means": 23 + 5 + 4 + 12 + 3 + 23, "stream_offsets": 3, "stream_rotation": 3},
    ),
    # a classifier's head takes up the last norm, and leaves the table of tokens alone, whatever the config ties
    "llama, classifier": (
        "Llama", {**LLAMA, "tie_word_embeddings": True, "pad_token_id": 0, "num_labels": 4},
        {"value_output": 4, "rotary_pairs": 2, "norm_gains": 12, "stream_rotation": 6, "neuron_scales": 3},
    ),
    "gpt2, tagger": (
        "GPT2", {**GPT2, "num_labels": 4},
        {**ATTENTION, "norm_gains": 12, "norm_biases": 12, "stream_means": 30 + 11 + 4, "stream_offsets": 3,
         "stream_rotation": 3},
    ),
}  # fmt: skip
# What is there beside the groups: an untied head without a bias lets its last norm's bias stand in the direction that
# LayerNorms do not see (4); rows of OPT's positions that no token has (2 rows, less their means).
BESIDE = {"gpt2, untied": 4, "opt": 2 * 3}
KINDS = {"llama, classifier": "LlamaForSequenceClassification", "gpt2, tagger": "GPT2ForTokenClassification"}
ACTING = [(m, g) for m, (_, _, groups) in MODELS.items() for g in groups if g in STREAM_SYMMETRIES]


def build(name, seed=0):
    family, sizes, _ = MODELS[name]
    torch.manual_seed(seed)
    kind = KINDS.get(name) or {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            gain = path.endswith("weight") and ("norm" in path or "ln_" in path)
            parameter.normal_(1.0 if gain else 0.0, 0.3 if gain else 0.8)
    return exact(model).double().eval()


def sequences(model, rows=40, length=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def logits(model):
    with torch.no_grad():
        return model(input_ids=sequences(model)).logits


def counts(model):
    live, view = Live(model), stream_of(model)
    found = {name: group.dimension(live.attention(0)) for name, group in SYMMETRIES.items()}
    found |= {name: group.dimension(view) for name, group in STREAM_SYMMETRIES.items()}
    return {name: size for name, size in found.items() if size}


@pytest.mark.parametrize("name", MODELS)
def test_no_freedom_of_the_model_is_missing(name, monkeypatch):
    """The nullity of the Jacobian of the logits with respect to every parameter is the sum of all dimensions."""
    model = build(name, seed=1)
    assert counts(model) == MODELS[name][2]
    numbers = sum(parameter.numel() for parameter in model.parameters())
    ids = sequences(model, rows=2 * numbers // logits(model)[0].numel() + 8)
    expected = sum(MODELS[name][2].values()) + BESIDE.get(name, 0)
    assert nullity(model, {"input_ids": ids}, lambda out: out.logits, monkeypatch) == expected


@pytest.mark.parametrize("name, group", ACTING)
def test_a_random_element_leaves_the_logits_unchanged_and_one_outside_does_not(name, group):
    symmetry, model = STREAM_SYMMETRIES[group], build(name)
    before, view = logits(model), stream_of(model)
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
    changed = [path for path, tensor in moved.tensors.items() if not torch.equal(tensor, view.tensors[path])]
    assert len(changed) > 1
    put_stream(model, moved)
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()
    assert symmetry.contains(view, moved)
    for other in STREAM_SYMMETRIES.values():
        if other.dimension(view) and other.name != group:
            assert not other.contains(view, moved), other.name
    if (
        group == "stream_means"
    ):  # each of its changes is a symmetry by itself: another value for each channel is none
        rows = moved.tensors[changed[0]] + torch.arange(4, dtype=torch.float64)
        outside = view.with_tensors({changed[0]: rows})
    else:
        outside = view.with_tensors({path: moved.tensors[path] for path in changed[:1]})
    put_stream(model, outside)
    assert (logits(model) - before).norm() > 1e-3 * before.norm()
    assert not symmetry.contains(view, outside)


@pytest.mark.parametrize("name, group", [(m, g) for m, g in ACTING if m in ("gpt2, untied", "opt", "phi")])
def test_a_bias_of_what_reads_the_stream_is_no_freedom_by_itself(name, group):
    """Of the way into the MLP, and of phi's head; without another change, and beside one of the group's."""
    symmetry, model = STREAM_SYMMETRIES[group], build(name)
    before, view = logits(model), stream_of(model)
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
    for bias in [f"{view.junctions[-1].mlp.up}.bias"] + ["lm_head.bias"] * (name == "phi"):
        for start in (view, moved):
            outside = view.with_tensors({**start.tensors, bias: start.tensors[bias] + 1})
            put_stream(model, outside)
            assert (logits(model) - before).norm() > 1e-3 * before.norm()
            assert not symmetry.contains(view, outside) and not symmetry.contains(outside, view)


@pytest.mark.parametrize("name", ["llama", "gpt2, untied", "phi", "llama, tied"])
def test_channels_that_a_gain_of_zero_hides_turn_among_each_other(name):
    """Of one norm two channels are hidden, so that each pair turns by itself: O(2), or ±1 where norms take the mean."""
    rotation, model = STREAM_SYMMETRIES["stream_rotation"], build(name)
    view = stream_of(model)
    gain = torch.tensor([0.0, 1.3, 0.0, 0.8], dtype=torch.float64)
    last = {"norm.weight": torch.tensor([1.0, 0.5, 1.0, 0.5]).double()} if name == "llama, tied" else {}
    view = view.with_tensors({f"{view.junctions[-1].norm}.weight": gain} | last)
    put_stream(model, view)
    before = logits(model)
    assert rotation.dimension(view) == (0 if view.stream.centred else 2)
    if view.stream.centred:
        turn = torch.eye(4, dtype=torch.float64)
        turn[1], turn[3] = turn[3].clone(), turn[1].clone()
        with pytest.raises(ValueError, match="this model has no such freedom .no two channels may be turned"):
            rotation.act(view, turn)
        return
    moved, fixed = (
        rotation.act(view, rotation.random(view, torch.Generator().manual_seed(2))),
        rotation.fix(view),
    )
    for other in (moved, fixed):
        put_stream(model, other)
        assert (logits(model) - before).norm() <= 1e-12 * before.norm()
        assert rotation.contains(view, other)
    for path, tensor in rotation.fix(moved).tensors.items():
        torch.testing.assert_close(tensor, fixed.tensors[path], rtol=1e-9, atol=1e-9)
    mixed = torch.eye(4, dtype=torch.float64)
    mixed[:2, :2] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    with pytest.raises(ValueError, match="expected zeros between .*channels that a norm's gain of 0 hides"):
        rotation.act(view, mixed)


def test_hidden_channels_of_layer_norms_keep_their_mean():
    """Three channels seen, of which the mean stays; the hidden one's bias and its readers' weights stay in force."""
    rotation, model = STREAM_SYMMETRIES["stream_rotation"], build("gpt2, untied")
    view = stream_of(model)
    gain = torch.tensor([0.7, 1.3, 0.0, 0.8], dtype=torch.float64)
    view = view.with_tensors({"h.0.ln_1.weight": gain})
    put_stream(model, view)
    before = logits(model)
    assert rotation.dimension(view) == 1
    moved = rotation.act(view, rotation.random(view, torch.Generator().manual_seed(2)))
    put_stream(model, moved)
    assert not torch.equal(moved.tensors["wte.weight"], view.tensors["wte.weight"])
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()
    assert rotation.contains(view, moved) and rotation.contains(view, rotation.fix(moved))


@pytest.mark.parametrize("name, group", ACTING)
def test_fix_is_one_point_of_the_orbit(name, group):
    symmetry, model = STREAM_SYMMETRIES[group], build(name)
    before, view = logits(model), stream_of(model)
    fixed = symmetry.fix(view)
    put_stream(model, fixed)
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()
    assert symmetry.contains(view, fixed)
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
    for start in (fixed, moved):
        for path, tensor in symmetry.fix(start).tensors.items():
            torch.testing.assert_close(tensor, fixed.tensors[path], rtol=1e-9, atol=1e-9)


def test_layer_norms_are_rms_norms_once_means_are_fixed():
    """All that is added to the stream has no mean then, so that nothing is left to subtract."""
    model = build("phi")
    view = STREAM_SYMMETRIES["stream_means"].fix(stream_of(model))
    before = logits(model)
    put_stream(model, view)
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.LayerNorm):
            plain = Rms(module)
            model.set_submodule(path, plain)
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()


class Rms(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) + self.bias


def test_tied_embeddings_turn_among_channels_of_the_same_gain_only():
    model = build("llama, tied")
    view = stream_of(model)
    rotation, gain = STREAM_SYMMETRIES["stream_rotation"], view.tensors["norm.weight"]
    assert view.head == "tied" and rotation.dimension(view) == 0
    with pytest.raises(ValueError, match="no such freedom .its head shares the table of embeddings"):
        rotation.act(view, torch.eye(4, dtype=torch.float64))
    view = view.with_tensors({"norm.weight": torch.stack([gain[0], gain[1], gain[0], gain[0]])})
    put_stream(model, view)
    before = logits(model)
    assert rotation.dimension(view) == 3
    moved = rotation.act(view, rotation.random(view, torch.Generator().manual_seed(2)))
    put_stream(model, moved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits(model) - before).norm() <= 1e-12 * before.norm()
    assert rotation.contains(view, moved)
    everywhere = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    with pytest.raises(
        ValueError, match="expected zeros between channels whose gains in the last norm differ"
    ):
        rotation.act(view, everywhere)


def test_a_rotation_has_to_be_one_and_to_leave_the_mean_alone():
    rotation = STREAM_SYMMETRIES["stream_rotation"]
    llama, gpt2 = stream_of(build("llama")), stream_of(build("gpt2, untied"))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    rotation.act(llama, turn)
    with pytest.raises(ValueError, match="expected an orthogonal matrix"):
        rotation.act(llama, 2 * turn)
    with pytest.raises(ValueError, match="leaves 1ᵀ alone"):
        rotation.act(gpt2, turn)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\), got \(3, 3\)"):
        rotation.act(llama, turn[:3, :3])
    with pytest.raises(ValueError, match=r"element of norm_gains: expected shape \(12,\), got \(4,\)"):
        STREAM_SYMMETRIES["norm_gains"].act(llama, torch.ones(4, dtype=torch.float64))


def test_a_model_whose_stream_is_its_output_keeps_its_basis():
    """Without a head there is nothing to take up the last norm, and everyone sees it."""
    model = transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)).double()
    view = stream_of(model)
    assert view.head == "none" and STREAM_SYMMETRIES["stream_rotation"].dimension(view) == 0
    assert STREAM_SYMMETRIES["norm_gains"].dimension(view) == 8
    with pytest.raises(ValueError, match="no such freedom .its stream is its output"):
        STREAM_SYMMETRIES["stream_rotation"].act(view, torch.eye(4, dtype=torch.float64))


def test_norms_on_the_stream_itself_have_no_view():
    with pytest.raises(ValueError, match="residual stream of 'bert' models has no view"):
        stream_of(transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=2)))


def test_a_stream_that_lacks_a_weight_has_no_view():
    model = build("gpt2, tagger")
    assert stream_of(model).stream.head == "classifier"
    del model.transformer.h[0].ln_2.weight
    with pytest.raises(
        ValueError, match="its stream needs a tensor named 'transformer.h.0.ln_2.weight', and there"
    ):
        stream_of(model)
