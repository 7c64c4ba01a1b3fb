"""Slicing: nothing cut changes nothing, the exact forms agree, and what is cut is what SliceGPT says."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import transformers
from safetensors.torch import load_file, save_file

import gaugekit as gk
import stream_rows
from gaugekit.calibration import streaming
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.hf import loading
from gaugekit.hf.sliced import Sliced
from gaugekit.slicing import run, sliced_width
from sliceable import FAMILIES, WORDS, build, exact, ids, save
from tiny import add_tokenizer

SIZES = dict(window=32, windows=8)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """(name, directory, text, the float64 logits of the plain model)."""
    source, text = save(request.param, tmp_path_factory.mktemp("family"))
    with torch.no_grad():
        return request.param, source, text, exact(loading.model(source, torch.float64))(ids()).logits


def logits(directory, tokens=None):
    with torch.no_grad():
        return exact(loading.model(directory, torch.float64))(ids() if tokens is None else tokens).logits


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", ["dense", "triangular", "polar"])
def test_nothing_cut_changes_nothing(family, tmp_path, form):
    _, source, text, expected = family
    report = gk.slicing.slice(source, tmp_path / "out", 0.0, calibration=text, rotation=form, **SIZES)
    assert relative(logits(tmp_path / "out"), expected) < 1e-12
    step = report["steps"][0]
    assert step["width"] == 32 and step["form"] == form and step["kept"] == pytest.approx(1.0)


def test_a_second_reader_of_the_end_keeps_it_whole(tmp_path):
    config = transformers.GPT2Config(**FAMILIES["gpt2"][1])
    torch.manual_seed(0)
    (model := transformers.GPT2DoubleHeadsModel(config).double().eval()).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(WORDS * 12)
    given = dict(calibration=tmp_path / "text.txt", **SIZES)
    with pytest.raises(ValueError, match="^head: expected False beside multiple_choice_head.summary.weight"):
        gk.slicing.slice(tmp_path / "model", tmp_path / "out", 0.25, head=True, **given)
    gk.slicing.slice(tmp_path / "model", tmp_path / "out", 0.0, **given)
    with torch.no_grad():
        found, expected = loading.model(tmp_path / "out", torch.float64)(ids()), model(ids())
    for name in ("logits", "mc_logits"):
        assert relative(found[name], expected[name]) < 1e-12


@pytest.mark.parametrize("head", [False, True])
def test_the_exact_forms_are_one_function(family, tmp_path, head):
    name, source, text, expected = family
    counts, outputs = {}, {}
    for form in ("dense", "triangular", "polar"):
        out = tmp_path / form
        report = gk.slicing.slice(source, out, 0.25, calibration=text, rotation=form, head=head, **SIZES)
        model = loading.model(out, torch.float64)
        counts[form] = report["parameters_after"]
        assert counts[form] == sum(parameter.numel() for parameter in model.parameters())
        assert counts[form] == report["steps"][0]["forms"][form]["numbers"]
        assert report["parameters_before"] - counts[form] == report["steps"][0]["removed"]["total"]
        outputs[form] = logits(out)
    assert relative(outputs["triangular"], outputs["dense"]) < 1e-12
    assert relative(outputs["polar"], outputs["dense"]) < 1e-12
    assert 0.01 < relative(outputs["dense"], expected) < 2  # a quarter of a random stream is missed
    junctions = 2 if name == "phi" else 4
    inner = junctions if head else junctions - 1
    # width 24 of 32: dense 24², triangular 24·25/2, polar 8·9/2 + 16·8
    assert counts["dense"] - counts["triangular"] == inner * (576 - 300)
    assert counts["dense"] - counts["polar"] == inner * (576 - 164)


def test_auto_takes_the_form_of_fewest_numbers(tmp_path):
    source, text = save("llama tied", tmp_path)
    forms = {}
    for fraction in (0.25, 0.5):
        out = tmp_path / str(fraction)
        step = gk.slicing.slice(source, out, fraction, calibration=text, **SIZES)["steps"][0]
        assert step["forms"][step["form"]]["numbers"] == min(
            form["numbers"] for form in step["forms"].values()
        )
        forms[fraction] = step["form"], step["forms"]
    # at a quarter Y [24, 8] is the less, at a half Y [16, 16] is as many numbers as a triangle and twice the products
    assert forms[0.25][0] == "polar"
    shortcut = {form: entry["multiply_adds"] for form, entry in forms[0.25][1].items()}
    assert shortcut == {
        "dense": 3 * 576 + 24 * 32,
        "triangular": 3 * 576 + 24 * 32,
        "polar": 3 * 384 + 24 * 32,
    }


def test_the_streams_that_are_cut_are_those_of_slicegpt(tmp_path):
    """The algorithm of SliceGPT, section 3, on the live model: the stream is cut to the leading eigenvectors of its
    covariance at each junction in turn; the sliced checkpoint is that function, and its bases span those spaces.
    """
    source, text = save("llama tied", tmp_path)
    gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, rotation="dense", **SIZES)
    model = exact(build("llama tied"))
    tokenizer = loading.tokenizer(source)
    every = tokenizer(text.read_text())["input_ids"]
    sample = torch.tensor([every[start : start + 32] for start in range(0, 256, 32)])
    projectors: list[torch.Tensor] = []

    def run(tokens, learn):
        places = iter(range(10))

        def cut(x):
            place = next(places)
            if learn:
                rows = x.flatten(0, 1)
                vectors = torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -24:]
                projectors.append(vectors @ vectors.mT)
            return x @ projectors[place]

        x = cut(model.model.embed_tokens(tokens))
        positions = torch.arange(tokens.shape[1])[None]
        turns = model.model.rotary_emb(x, positions)
        hidden = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)[None, None]
        for number, layer in enumerate(model.model.layers):
            attention, _ = layer.self_attn(
                layer.input_layernorm(x), position_embeddings=turns, attention_mask=hidden
            )
            x = cut(x + attention)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if number == 0:
                x = cut(x)
        return model.lm_head(model.model.norm(x))

    with torch.no_grad():
        run(sample, learn=True)
        expected = run(ids(), learn=False)
    assert len(projectors) == 4
    # the checkpoint's bases come from a run in float32, whose eigenvectors are off by its rounding over the gaps
    assert relative(logits(tmp_path / "out"), expected) < 1e-4
    rotation = Checkpoint(tmp_path / "out").read("model.embed_tokens.rotation")
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ rotation.mT, projectors[0], rtol=0, atol=1e-5)


def test_a_kill_anywhere_loses_little_and_changes_nothing(tmp_path, monkeypatch):
    source, text = save("gpt2", tmp_path)
    gk.slicing.slice(source, tmp_path / "whole", 0.25, calibration=text, **SIZES)
    through, calls = streaming.Pass.through, []

    def interrupted(self, layer, *arguments, **named):
        calls.append(layer)
        if len(calls) in (2, 5):  # in the first layer, then in the second
            raise KeyboardInterrupt
        through(self, layer, *arguments, **named)

    monkeypatch.setattr(streaming.Pass, "through", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "_save", _stopping_at(2, run._save))
        gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    assert calls == [0, 0, 0, 0, 1, 1, 1]
    runs = len(calls)
    gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    assert len(calls) == runs  # every layer had been read
    whole, out = (Checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert whole.names() == out.names()
    assert all(torch.equal(whole.read(name), out.read(name)) for name in whole.names())


def test_unfinished_work_of_another_call_is_not_taken_up(tmp_path, monkeypatch):
    source, text = save("gpt2", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(streaming.Pass, "through", _stopping_at(1, None))
        with pytest.raises(KeyboardInterrupt):
            gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    with pytest.raises(ValueError, match="unfinished work of another call"):
        gk.slicing.slice(source, tmp_path / "out", 0.5, calibration=text, **SIZES)
    report = gk.slicing.slice(source, tmp_path / "out", 0.5, calibration=text, resume=False, **SIZES)
    assert report["steps"][0]["width"] == 16


def test_forms_share_the_bases_in_a_work_directory(tmp_path, monkeypatch):
    """The text is read once for all forms, each the same as without the folder, and no other call takes the bases."""
    source, text = save("gpt2", tmp_path)
    shared = dict(calibration=text, work_directory=tmp_path / "work", **SIZES)
    gk.slicing.slice(source, tmp_path / "dense", 0.25, rotation="dense", **shared)
    with monkeypatch.context() as patch:
        patch.setattr(streaming.Pass, "through", _stopping_at(1, None))
        patch.setattr(streaming.Pass, "embed", _stopping_at(1, None))
        gk.slicing.slice(source, tmp_path / "polar", 0.25, rotation="polar", **shared)
        with pytest.raises(ValueError, match="work_directory: .* another call .*width differs"):
            gk.slicing.slice(source, tmp_path / "half", 0.5, **shared)
    gk.slicing.slice(source, tmp_path / "alone", 0.25, rotation="polar", calibration=text, **SIZES)
    polar, alone = (Checkpoint(tmp_path / name) for name in ("polar", "alone"))
    assert all(torch.equal(polar.read(name), alone.read(name)) for name in alone.names())
    assert not list((tmp_path / "work").glob("hidden_*"))  # the stream itself does not stay


def _stopping_at(call, function):
    """``function``, killed at its ``call``-th call."""
    count = iter(range(1, 1000))

    def stopping(*arguments, **named):
        if next(count) == call:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return stopping


def test_what_else_a_config_says_stays(tmp_path):
    source, text = save("llama", tmp_path)
    gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    quantization = after.pop("quantization_config")
    assert after == before and after["rope_parameters"]["factor"] == 2.0
    assert quantization["sliced"] == {"width": 24, "form": "polar", "ranks": [8, 8, 8], "head": False}
    source, text = save("opt", tmp_path / "opt", dropout=0.1)
    gk.slicing.slice(source, tmp_path / "other", 0.25, calibration=text, **SIZES)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dropout"] == 0.0


def test_dropping_columns_is_said_to_be_approximate_and_stores_less(tmp_path):
    source, text = save("llama", tmp_path)
    exact_report = gk.slicing.slice(source, tmp_path / "a", 0.25, calibration=text, rotation="polar", **SIZES)
    report = gk.slicing.slice(
        source, tmp_path / "b", 0.25, calibration=text, rotation="polar", drop=0.5, **SIZES
    )
    ranks = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["sliced"]["ranks"]
    assert min(ranks) < 8 and report["parameters_after"] < exact_report["parameters_after"]
    assert report["parameters_before"] - report["parameters_after"] == report["steps"][0]["removed"]["total"]
    assert relative(logits(tmp_path / "b"), logits(tmp_path / "a")) > 1e-3
    none = gk.slicing.slice(
        source, tmp_path / "c", 0.25, calibration=text, rotation="polar", drop=1.0, **SIZES
    )
    assert none["parameters_after"] < report["parameters_after"]
    assert logits(tmp_path / "c").isfinite().all()


WIDTHS = [(576, 0.2, 464), (576, 0.25, 432), (576, 0.3, 400), (32, 0, 32), (8, 0.9, 8)]


@pytest.mark.parametrize(("size", "fraction", "width"), WIDTHS)
def test_the_width_is_rounded_to_the_nearest_multiple(size, fraction, width):
    assert sliced_width(size, fraction) == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 1.0}, "fraction: expected a share from 0 to less than 1, got 1.0"),
        ({"fraction": True}, "fraction: expected a share"),
        (
            {"rotation": "random"},
            "rotation: expected one of dense, triangular, polar, bits-back, auto; got 'random'",
        ),
        ({"drop": 0.1}, "drop: expected beside rotation='polar', got it beside 'auto'"),
        ({"drop": -1, "rotation": "polar"}, "drop: expected a number from 0 to 1 or 'auto', got -1"),
        (
            {"drop": "auto", "rotation": "polar", "window": 32, "windows": 40},
            "calibration: expected 48 windows of 32 tokens beside drop='auto'",
        ),
        ({"multiple": 0}, "multiple: expected a positive integer, got 0"),
        ({"windows": 0}, "windows: expected a positive integer, got 0"),
        ({"calibration": "nowhere.txt"}, "calibration: expected a text file, got 'nowhere.txt'"),
    ],
)
def test_bad_arguments_are_named(tmp_path, changes, message):
    source, text = save("llama", tmp_path)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        gk.slicing.slice(source, tmp_path / "out", **{"calibration": text, **changes})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_families_without_a_view_of_their_stream_are_refused(tmp_path):
    from tiny import add_tokenizer, bert

    bert().save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc " * 100)
    with pytest.raises(ValueError, match="the residual stream of 'bert' models has no view yet"):
        gk.slicing.slice(tmp_path / "model", tmp_path / "out", calibration=tmp_path / "text.txt")
    source, text = save("opt", tmp_path / "opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="do_layer_norm_before: expected True, got False"):
        gk.slicing.slice(source, tmp_path / "out", calibration=text)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "a calibration runs one text through the decoder of a language model"),
        ("vit", "what begins this stream is an image"),
        ("clip's text", "slicing takes models of language"),
        ("olmo2", "norms over all D channels stand behind its parts"),
        ("gemma", r"its norms multiply by 1 \+ w"),
    ],
)
def test_streams_that_groups_turn_and_slicing_cannot_cut_are_refused(tmp_path, name, reason):
    stream_rows.build(name).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc " * 100)
    with pytest.raises(ValueError, match=f"cannot be sliced: .*{reason}"):
        gk.slicing.slice(tmp_path / "model", tmp_path / "out", calibration=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["embed_tokens", "mlp.up_proj", "post_attention_layernorm"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, part):
    source, text = save("llama", tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[::7] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected a model whose residual stream is finite"):
        gk.slicing.slice(source, tmp_path / "out", calibration=text, **SIZES)


def test_layers_without_biases_are_sliced_where_their_norms_have_none(tmp_path):
    source, text = save("opt", tmp_path, enable_bias=False)
    with pytest.raises(ValueError, match=r"q_proj: expected a bias, which takes up that of .*layer_norm"):
        gk.slicing.slice(source, tmp_path / "out", calibration=text, **SIZES)
    assert not (tmp_path / "out.partial").exists()  # refused before the text was read
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("layer_norm.bias"):
            tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    gk.slicing.slice(source, tmp_path / "out", 0.0, calibration=text, **SIZES)
    assert relative(logits(tmp_path / "out"), logits(source)) < 1e-12


def test_a_checkpoint_without_a_head_keeps_its_last_norm(tmp_path):
    source, text = save("llama", tmp_path)
    bare = exact(build("llama").model)
    build("llama").model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"head: expected False for a checkpoint without lm_head.weight"):
        gk.slicing.slice(source, tmp_path / "out", calibration=text, head=True, **SIZES)
    gk.slicing.slice(source, tmp_path / "out", 0.0, calibration=text, **SIZES)
    with torch.no_grad():
        got, expected = (
            model(ids())[0] for model in (exact(loading.model(tmp_path / "out", torch.float64)), bare)
        )
    assert relative(got, expected) < 1e-12


SOUND = {"width": 8, "form": "polar", "ranks": [2], "head": False}


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {},
        {**SOUND, "width": 0},
        {**SOUND, "form": "odd"},
        {**SOUND, "ranks": [9]},
        {**SOUND, "ranks": 3},
        {**SOUND, "head": 1},
        {**SOUND, "more": 1},
    ],
)
def test_a_spec_that_is_none_is_refused(spec):
    with pytest.raises(ValueError, match="sliced: expected width"):
        Sliced.read(spec)


def test_a_spec_that_does_not_fit_its_model_is_refused(tmp_path):
    source, text = save("llama", tmp_path)
    gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"ranks": [8]}, "ranks: expected 3 of them, got 1"),
        ({"width": 40}, "at most 32, got 40"),
    ):
        spec = {**config["quantization_config"]["sliced"], **change}
        path.write_text(
            json.dumps({**config, "quantization_config": {**config["quantization_config"], "sliced": spec}})
        )
        with pytest.raises(ValueError, match=message):
            loading.model(tmp_path / "out", torch.float32)
