"""What reads a stream's end, or begins it, beside what an adapter names: handled, or left alone with the reason."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import gaugekit as gk  # noqa: E402
from gaugekit.symmetry import STREAM_SYMMETRIES, put_stream, stream_of  # noqa: E402
from stream_rows import MODELS  # noqa: E402
from stream_rows import build as build_row  # noqa: E402

TIED = ("t5", "mt5", "umt5", "mbart", "pegasus", "blenderbot", "m2m_100", "whisper", "gemma", "gpt2", "opt")
ROTATION = STREAM_SYMMETRIES["stream_rotation"]


# width 4, eleven tokens, three hidden units
SHARED = dict(vocab_size=11, bos_token_id=0, eos_token_id=1, pad_token_id=0, num_hidden_layers=1)
LLAMA = dict(
    SHARED,
    hidden_size=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    intermediate_size=3,
    num_labels=3,
)
GPT2 = dict(
    vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, n_inner=3, bos_token_id=0, eos_token_id=1,
    pad_token_id=0, num_labels=1,
)  # fmt: skip
OPT = dict(
    SHARED, hidden_size=4, num_attention_heads=2, ffn_dim=3, word_embed_proj_dim=4, max_position_embeddings=6
)
DECODERS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "llama, classifier": ("LlamaForSequenceClassification", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, untied": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
    "gpt2, two heads": ("GPT2DoubleHeadsModel", GPT2),
    "gpt2, two heads, untied": ("GPT2DoubleHeadsModel", {**GPT2, "tie_word_embeddings": False}),
    "opt": ("OPTForCausalLM", OPT),
}


def build(name):
    """A float64 model, every number random."""
    if name not in DECODERS:
        return build_row(name)
    kind, sizes = DECODERS[name]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            gain = path.endswith("weight") and ("norm" in path or "ln_" in path)
            parameter.normal_(1.0 if gain else 0.0, 0.3 if gain else 0.8)
    return model.double().eval()


def unobservable(source):
    return gk.inspect(source)["unobservable"]


def changed(folder, change, **entries):
    """What ``change`` makes of the tensors of a saved model, and other ``entries`` of its config."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def table(tensors):
    ends = ("shared.weight", "embed_tokens.weight", "wte.weight")
    return next(name for name in tensors if name.endswith(ends))


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("held", ["own", "copy", "only"])
def test_a_file_that_holds_a_head_counts_as_what_is_loaded_from_it(name, held, tmp_path):
    """A config says tied. transformers unties what differs, ties what does not, and takes whichever is there."""
    model = build(name)
    head = "proj_out.weight" if name == "whisper" else "lm_head.weight"
    model.save_pretrained(tmp_path)

    def change(tensors):
        shared = table(tensors)
        tensors[head] = torch.randn_like(tensors[shared]) if held == "own" else tensors[shared].clone()
        if held == "only":
            del tensors[shared]

    loaded, told = type(model).from_pretrained(
        changed(tmp_path, change), dtype=torch.float64, output_loading_info=True
    )
    assert not told["missing_keys"] and model.config.tie_word_embeddings
    apart = loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert apart is (held == "own")
    assert unobservable(tmp_path) == unobservable(loaded)
    assert (unobservable(loaded) != unobservable(model)) is apart


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_tables_of_an_encoder_and_a_decoder_are_one_or_have_no_view(name, tmp_path):
    model, sides = build(name), ("encoder", "decoder")
    model.save_pretrained(tmp_path)

    def copies(tensors):
        shared = table(tensors)
        for side in sides:
            tensors[shared.replace("shared", f"{side}.embed_tokens")] = tensors[shared].clone()

    def alone(tensors):
        del tensors[table({name: None for name in tensors if "shared" in name})]

    def differs(tensors):
        tensors[next(name for name in tensors if "encoder.embed_tokens" in name)] += 1

    for change in (copies, alone):
        assert unobservable(changed(tmp_path, change)) == unobservable(model)
    model.save_pretrained(tmp_path)
    changed(tmp_path, copies)
    loaded = type(model).from_pretrained(changed(tmp_path, differs), dtype=torch.float64)
    for source in (tmp_path, loaded):
        report = gk.inspect(source)
        assert report["unobservable"]["norm_gains"] == 0
        assert any("encoder.embed_tokens.weight' is a table of its own" in note for note in report.notes)


def test_an_untied_mbart_begins_in_tables_of_its_own():
    """Its encoder and its decoder do not read ``shared``, so that turning it would turn nothing."""
    _, config, sizes, _, _ = MODELS["mbart"]
    config = getattr(transformers, config)(**sizes, tie_word_embeddings=False)
    model = transformers.MBartForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight' has the width of its stream"):
        stream_of(model)
    entries = config.to_dict() | {"architectures": [type(model).__name__]}
    assert unobservable(entries) == unobservable(model)


@pytest.mark.parametrize(
    ("name", "head", "lost"),
    [
        ("llama", "my_head.weight", {"norm_gains": 4, "stream_rotation": 6}),
        ("llama", "v_head.summary.weight", {"norm_gains": 4, "stream_rotation": 6}),
        ("llama, classifier", "my_head.weight", {"norm_gains": 4, "stream_rotation": 6}),
        ("gpt2, untied", "my_head.weight", {"norm_gains": 4, "stream_rotation": 3}),
        ("llama, tied", "my_head.weight", {}),
        ("t5's encoder", "my_head.weight", {"norm_gains": 4, "stream_rotation": 6}),
    ],
)
def test_a_head_that_nobody_knows_keeps_the_last_norm_and_the_basis(name, head, lost, tmp_path):
    """``lost``: the last norm's gains, and the basis."""
    model = build(name)
    model.save_pretrained(tmp_path)
    before = unobservable(model)
    changed(tmp_path, lambda tensors: tensors.__setitem__(head, torch.randn(1, 4)))
    module, path = model, head.split(".")[:-1]
    for part in path[:-1]:
        module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.add_module(path[-1], torch.nn.Linear(4, 1, bias=False).double())
    for source in (tmp_path, model):
        report = gk.inspect(source)
        left = {group: before[group] - lost.get(group, 0) for group in before if group != "total"}
        assert {group: report["unobservable"][group] for group in left} == left
        assert any(f"since {head!r} has no view here" in note for note in report.notes)
    view = stream_of(model)
    assert view.stranger == head and ROTATION.dimension(view) == 0
    with pytest.raises(ValueError, match="this model has no such freedom"):
        ROTATION.act(view, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["model.layers.0.adapter.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_stands_inside_of_a_model_and_nobody_knows_rules_its_stream_out(name, tmp_path):
    """An adapter, or a layer more than the config has."""
    build("llama").save_pretrained(tmp_path)
    changed(tmp_path, lambda tensors: tensors.__setitem__(name, torch.randn(3, 4)))
    report = gk.inspect(tmp_path)
    assert report["unobservable"]["total"] == 6  # value_output 4, rotary_pairs 2
    assert any(f"{name!r} has the width of its stream" in note for note in report.notes)


@pytest.mark.parametrize("tied", [True, False])
def test_two_heads_take_up_the_last_norm_together(tied, tmp_path):
    model = build("gpt2, two heads" if tied else "gpt2, two heads, untied")
    if tied:  # where the last norm's gains agree, the table and the other head turn together
        model.transformer.ln_f.weight.data.fill_(0.7)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 11, (3, 2, 6), generator=torch.Generator().manual_seed(1))

    def answers():
        with torch.no_grad():
            out = model(ids, mc_token_ids=torch.full((3, 2), 5))
        return torch.cat([out.logits.flatten(), out.mc_logits.flatten()])

    view, before = stream_of(model), answers()
    assert view.heads == ("lm_head", "multiple_choice_head.summary")
    assert unobservable(tmp_path) == unobservable(model)
    for group in STREAM_SYMMETRIES.values():
        if group.dimension(view) == 0:
            continue
        moved = group.act(view, group.random(view, torch.Generator().manual_seed(2)))
        for other in (moved, group.fix(view)):
            put_stream(model, other)
            assert (answers() - before).norm() <= 1e-12 * before.norm() and group.contains(view, other)
        put_stream(model, view)
    assert ROTATION.dimension(view) == 3


def test_a_head_that_stands_deeper_is_not_taken_for_none():
    """A wrapper around a tied model: its table makes logits, whatever else it has."""
    model = build("llama, tied")
    wrapper = torch.nn.Module()
    wrapper.config, wrapper.inner = model.config, model
    with pytest.raises(ValueError, match="expected its head at 'lm_head', found it at 'inner.lm_head'"):
        stream_of(wrapper)


def test_a_class_of_its_own_may_have_logits(tmp_path):
    """Of a tied model the file holds no head; where the config names no class of transformers', it may have one."""
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    expected = unobservable(model)
    assert unobservable(changed(tmp_path, lambda _: None, architectures=["SomeonesWriter"])) == expected
    bare = unobservable(changed(tmp_path, lambda _: None, architectures=["GPT2Model"]))
    assert bare["stream_means"] == expected["stream_means"] + 11
