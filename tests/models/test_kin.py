"""Kin of BERT, Llama and others: each group is fixed where it holds, whatever rules out another."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
import gaugekit.integrations.transformers  # noqa: E402
import kin as checks  # noqa: E402
from decoder_rows import DECODERS, NORMED, OWN_ATTENTION  # noqa: E402
from gaugekit.hf import loading  # noqa: E402
from gaugekit.models import FAMILIES, Live, unused_positions  # noqa: E402
from gaugekit.symmetry import REMOVED, SYMMETRIES  # noqa: E402
from kin import ALL, BIASES, IMAGE, TEXT  # noqa: E402

OPT = dict(
    vocab_size=60, hidden_size=24, word_embed_proj_dim=24, num_attention_heads=3, num_hidden_layers=2, ffn_dim=32,
    max_position_embeddings=20, dropout=0.0,
)  # fmt: skip
PHI = dict(
    vocab_size=60, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=20,
)  # fmt: skip

# name: (class, config class, sizes, the groups that are fixed and what each key/value head of width 8 has of them: in
# every layer, or layer by layer)
KIN = {
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, ALL),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", TEXT, ALL),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", TEXT, ALL),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, ALL),
    "vit bare": ("ViTModel", "ViTConfig", {**IMAGE, "qkv_bias": False}, {"value_output": 64, "query_key": 64}),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", IMAGE, ALL),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, ALL),
    "phi": ("PhiForCausalLM", "PhiConfig", PHI, BIASES),
    "phi with norms": ("PhiForCausalLM", "PhiConfig", {**PHI, "qk_layernorm": True}, BIASES),
    "deberta-v2": (
        "DebertaV2Model", "DebertaV2Config", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        BIASES,
    ),
    "deberta-v2 shared": (
        "DebertaV2Model", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
        {**BIASES, "query_key": 64},
    ),
    **NORMED,
    **DECODERS,
}  # fmt: skip

# What a model of float64 may err where its own attention goes through float32: products of queries and keys, or
# probabilities, whose rows then sum to one no more exactly than that.
SINGLE = {"gpt_neo": 1e-5, "bloom": 1e-6, "gemma2": 1e-6}
WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def made(name, dtype=torch.float64, changes=None):
    """The tiny model, its weights and biases random, so that no zero hides an error; and an input for it."""
    kind, config, sizes, _ = KIN[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **(changes or {})}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products lack float64
    inputs = {"input_ids": torch.randint(3, 60, (2, 9))}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    return model.to(dtype).eval(), inputs


def expected(name, heads):
    counts = dict.fromkeys(REMOVED, 0)
    for group, size in KIN[name][3].items():
        counts[group] = heads * sum(size if isinstance(size, tuple) else (size, size))
    return {**counts, "total": sum(counts.values())}


@pytest.mark.parametrize("name", KIN)
def test_every_group_that_holds_is_fixed_and_no_output_moves(name):
    model, inputs = made(name)
    live, bound = Live(model), SINGLE.get(name, 1e-12)
    with torch.no_grad():
        before = model(**inputs)[0]
        for group in KIN[name][3]:
            symmetry, view = SYMMETRIES[group], live.attention(1)
            moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(1)))
            live.write(live.family.store(1, moved).tensors)
            assert (model(**inputs)[0] - before).norm() < bound * before.norm(), group
        for group in KIN[name][3]:  # in another order than all at once
            live.write(live.family.store(1, SYMMETRIES[group].fix(live.attention(1))).tensors)
            assert (model(**inputs)[0] - before).norm() < bound * before.norm(), group
        report = gk.symmetry.fix(model)
        after = model(**inputs)[0]
    assert (after - before).norm() < bound * before.norm()
    assert all(layer["invariance_error"] < 1e-13 for layer in report["layers"])
    assert report["removed"] == expected(name, live.attention(0).groups)
    view = live.attention(0)
    assert {note.split(":")[0] for note in report.notes} == set(view.barred)
    assert set(view.barred).isdisjoint(KIN[name][3])


@pytest.mark.parametrize("name", KIN)
def test_an_adapter_names_the_tensors_there_are_and_stores_what_it_read(name):
    live = Live(made(name)[0])
    assert type(live.family) is FAMILIES[live.config["model_type"]] and live.family.config is live.config
    assert len(live) == live.family.layers == 2
    for layer in range(2):
        view, outline = live.attention(layer), live.family.outline(layer)
        stored = live.family.store(layer, view).tensors
        assert {path: tuple(tensor.shape) for path, tensor in stored.items()} == live.family.shapes(layer)
        for path, tensor in stored.items():
            assert torch.equal(tensor, live.read(path)), path
        for part in "qkvo":
            assert getattr(outline, part).weight.is_meta
            assert getattr(outline, part).weight.shape == getattr(view, part).weight.shape


@pytest.mark.parametrize(
    "name", ["qwen3", "deberta-v2", "deberta-v2 shared", "stablelm with norms", "gemma2"]
)
def test_what_is_left_alone_would_be_seen(name):
    """The key bias there is no symmetry: moving it changes the output."""
    model, inputs = made(name)
    live = Live(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        view = live.attention(0)
        path = live.family.projections(0)["k"]
        model.get_parameter(f"{live.prefix}{path}.bias").add_(torch.randn(view.groups * 8).double())
        assert (model(**inputs)[0] - before).norm() > 1e-4 * before.norm()


@pytest.mark.parametrize("name", [name for name in DECODERS if "query_key" not in DECODERS[name][3]])
def test_no_product_that_keeps_the_scores_is_left_out(name):
    """Where queries and keys are left alone, matrices that would keep the scores but for what stands between move the
    output: what is not fixed can be seen."""
    model, inputs = made(name)
    live, product = Live(model), SYMMETRIES["query_key"]
    with torch.no_grad():
        before = model(**inputs)[0]
        view = live.attention(1)
        free = replace(view, rotary=0, barred={})
        moved = product.act(free, product.random(free, torch.Generator().manual_seed(1)))
        live.write(live.family.store(1, replace(view, q=moved.q, k=moved.k)).tensors)
        assert (model(**inputs)[0] - before).norm() > 1e-4 * before.norm()


def greedy(model, inputs):
    """The next tokens of a model that generates, the likeliest each time; None of any other."""
    if not model.can_generate():
        return None
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)


VERBS = pytest.mark.parametrize(
    "name", ["roberta", "vit", "deit", "qwen3", "stablelm", "opt", "phi", *DECODERS]
)


@VERBS
def test_through_every_verb(name, tmp_path):
    model, inputs = made(name, torch.float32)
    source = tmp_path / "model"
    model.save_pretrained(source)
    counts = expected(name, Live(model).attention(0).groups)
    unobservable = gk.inspect(source)["unobservable"]
    assert unobservable == gk.inspect(model)["unobservable"]
    assert {group: unobservable[group] for group in REMOVED} == {group: counts[group] for group in REMOVED}
    with torch.no_grad():
        output = model(**inputs)[0]
    tokens = greedy(model, inputs)
    for dense in (True, False):
        target = tmp_path / f"dense {dense}"
        report = gk.convert(source, target, [gk.symmetry.GaugeFix()], dense=dense, pack=not dense)
        gone = report["parameters_before"] - report["parameters_after"]
        assert gone == (0 if dense else counts["total"]) and report["invariance_error"] < 1e-13
        loaded, info = type(model).from_pretrained(target, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (loaded.eval()(**inputs)[0] - output).norm() < 1e-5 * output.norm()
        assert tokens is None or torch.equal(greedy(loaded, inputs), tokens)
    assert gk.verify(model, loaded)["ok"]
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**inputs)[0], loaded(**inputs)[0])


@pytest.mark.parametrize("name", ["opt", "qwen3", "gpt_neox", "smollm3", "gpt_bigcode", "falcon of few keys"])
def test_heads_are_turned_until_rows_are_triangular(name):
    counts = expected(name, Live(made(name)[0]).attention(0).groups)
    checks.check_turned(lambda dtype: made(name, dtype), counts, SINGLE.get(name, 1e-12))


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "smollm3"])
def test_turned_heads_are_stored_without_their_zeros(name, tmp_path):
    counts = expected(name, Live(made(name)[0]).attention(0).groups)
    checks.check_turned_files(lambda dtype: made(name, dtype), counts, tmp_path)


@VERBS
def test_ranks_are_lowered_where_that_has_a_meaning(name, tmp_path):
    model, inputs = made(name, torch.float32)
    barred = Live(model).attention(0).barred
    model.save_pretrained(tmp_path / "model")
    rewrites = [gk.rank.Truncate(6), gk.symmetry.GaugeFix()]
    if "query_key" in barred:
        with pytest.raises(ValueError, match=f"got a model in which {barred['query_key']}"):
            gk.convert(tmp_path / "model", tmp_path / "rank", rewrites)
        return
    gk.convert(tmp_path / "model", tmp_path / "rank", rewrites)
    loaded = type(model).from_pretrained(tmp_path / "rank").eval()
    with torch.no_grad():
        gk.rank.truncate(model, rank=6)
        output = model(**inputs)[0]
    assert (loaded(**inputs)[0] - output).norm() < 1e-5 * output.norm()


@VERBS
def test_fused_and_put_back(name):
    model, inputs = made(name, torch.float32)
    counts = expected(name, Live(model).attention(0).groups)
    with torch.no_grad():
        output = model(**inputs)[0]
        report = gk.fuse(model)
        declared = model._supports_sdpa or model._supports_attention_backend  # as its version has it
        own = KIN[name][0].startswith(OWN_ATTENTION) or not declared
        assert [entry["reason"].startswith("attention: ") for entry in report["left"]] == [True] * own
        assert (report["attention"] == "gaugekit") is not own
        assert report["parameters_before"] - report["parameters_after"] == counts["total"]
        assert (model(**inputs)[0] - output).norm() < 1e-5 * output.norm()
        gk.unfuse(model)
        assert torch.equal(model(**inputs)[0], output)


@pytest.mark.parametrize("name", DECODERS)
def test_resident_packed_weights(name):
    """Every plain projection is packed, in a model as wide as packing pays from, and unpacked bit for bit."""
    larger = {**dict.fromkeys(WIDTHS, 64), **dict.fromkeys(HEADS, 8)}
    model, inputs = made(
        name, torch.bfloat16, {size: larger[size] for size in KIN[name][2].keys() & larger.keys()}
    )
    with torch.no_grad():
        weights, output = {path: w.clone() for path, w in model.state_dict().items()}, model(**inputs)[0]
        report = gk.fuse(model, packed=True, attention=False)
        live = Live(model)
        plain = not name.startswith("falcon")  # whose projections are layers of its own
        entries = {entry["module"] for entry in report["replaced" if plain else "left"]}
        assert {live.prefix + path for path in live.family.modules(1).values()} <= entries
        assert (model(**inputs)[0] - output).norm() < 0.03 * output.norm()
        gk.unfuse(model)
        assert torch.equal(model(**inputs)[0], output)
    assert all(torch.equal(w, weights[path]) for path, w in model.state_dict().items())


@VERBS
def test_a_second_fix_changes_nothing(name):
    model, _ = made(name, torch.float32)
    gk.symmetry.fix(model)
    once = {path: weight.clone() for path, weight in model.state_dict().items()}
    gk.symmetry.fix(model)
    for path, weight in model.state_dict().items():
        assert torch.equal(weight, once[path]), path


def test_files_that_name_tensors_as_the_model_does_are_read_too(tmp_path):
    from safetensors.torch import save_file

    model, _ = made("vit", torch.float32)
    model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert gk.inspect(tmp_path).fields == gk.inspect(model).fields


def test_positions_that_padding_takes_are_not_given_to_tokens():
    assert unused_positions({"model_type": "roberta", "pad_token_id": 1}) == 2
    assert unused_positions({"model_type": "bert", "pad_token_id": 1}) == 0
    assert loading.positions(transformers.RobertaConfig(max_position_embeddings=514)) == 512
    assert loading.positions(transformers.BertConfig()) == 512


def test_a_fused_projection_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="'deberta' is not covered: its fused projection"):
        gk.models.family({"model_type": "deberta"})


def test_text_is_refused_where_pixels_are_read():
    model, _ = made("vit", torch.float32)
    with pytest.raises(ValueError, match="text: expected none, since the model reads pixels"):
        gk.verify(model, model, text=["A sentence."])
    roberta, _ = made("roberta", torch.float32)
    with pytest.raises(
        ValueError, match="b: expected a model that reads pixel_values, as a does, got input_ids"
    ):
        gk.verify(model, roberta)
