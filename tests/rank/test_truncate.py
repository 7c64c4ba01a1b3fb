"""Truncation of models: in place, fused, converted, loaded again; each family, and what is refused."""

import gc
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gaugekit as gk
from gaugekit import samples
from gaugekit.cli import main
from gaugekit.models import Live
from gaugekit.rank import Truncate
from gaugekit.symmetry import GaugeFix
from gaugekit.verbs.convert import convert
from tiny import add_tokenizer, bert, gpt2

SIZES = dict(
    vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
MAKE = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)).eval(),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SIZES)).eval(),
}
TEXT = samples.sentences(12)
TOKENS = torch.arange(2, 26).view(2, 12)


def made(kind):
    model = MAKE[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.mean().abs() < 0.1:
                parameter.normal_(0, 0.3)
    return model.double()


def states(model):
    with torch.no_grad():
        return model.base_model(input_ids=TOKENS).last_hidden_state.double()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def saved(tmp_path):
    def save(kind):
        made(kind).save_pretrained(tmp_path / "model")
        add_tokenizer(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("kind", MAKE)
def test_truncate_then_fuse_then_save_is_the_same_model(kind, tmp_path):
    model = made(kind)
    expected = states(model)
    full = gk.rank.truncate(model, rank=8)
    assert full["energy_kept"] == pytest.approx([1.0, 1.0]) and torch.equal(states(model), expected)
    report = gk.rank.truncate(model, rank=6)
    assert report["ranks"] == [[6] * len(report["ranks"][0])] * 2 and report["width"] == 8
    truncated = states(model)
    assert 1e-6 < distance(truncated, expected) < 1
    assert all(view.ranks == report["ranks"][0] for view in map(Live(model).attention, range(2)))
    before = sum(p.numel() for p in model.parameters())
    fused = gk.fuse(model, attention=False)
    forms = {one["form"] for one in fused["replaced"]}
    assert forms & {"low_rank_projection", "concat"}, forms
    assert fused["parameters_after"] < before
    assert distance(states(model), truncated) < 1e-12
    import gaugekit.integrations.transformers  # noqa: F401

    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="sdpa").eval()
    assert distance(states(again), truncated) < 1e-12
    gk.unfuse(model)
    assert distance(states(model), truncated) < 1e-12


@pytest.mark.parametrize(
    "options", [["--rank", "6"], ["--rank", "6", "--gauge"], ["--energy", ".7"], ["--dense"]]
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_convert_on_the_command_line(kind, options, saved, tmp_path, capsys):
    if options == ["--dense"]:
        options = ["--rank", "6", "--dense", "--gauge"]
    source, out = saved(kind), tmp_path / "out"
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    line = ["convert", source, out, *options, "--calibration", tmp_path / "text.txt", "--json"]
    assert main([*map(str, line)]) == 0
    report = json.loads(capsys.readouterr().out)
    gone = report["parameters_before"] - report["parameters_after"]
    assert gone == (
        0 if "--dense" in options else sum(step["removed"]["total"] for step in report["steps"])
    ), report
    assert not (tmp_path / "out.calibration").exists()
    model = AutoModel.from_pretrained(source, dtype=torch.float64).eval()
    loaded = AutoModel.from_pretrained(out, dtype=torch.float64, attn_implementation="sdpa").eval()
    gk.rank.truncate(model, TEXT, rank=report["steps"][0]["ranks"])
    assert (
        distance(states(loaded), states(model)) < 1e-6
    )  # the file was rounded to its dtype, float64 moments to none
    if "--dense" in options:
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_search_keeps_the_goal_and_restores_on_interruption(saved, monkeypatch):
    path = saved("bert")
    model = AutoModel.from_pretrained(path).eval()
    before = states(model)
    seen = []
    report = gk.rank.truncate(model, TEXT, min_cosine=0.99, progress=lambda *now: seen.append(now))
    assert seen == [(step, 10) for step in range(1, 11)]
    assert 0.99 <= report["mean_cosine"] < 1 and 1 <= report["mean_rank"] < 8
    model = AutoModel.from_pretrained(path).eval()

    def stop(*_):
        raise KeyboardInterrupt

    real, calls = gk.rank.search.embeddings, []
    monkeypatch.setattr(
        gk.rank.search, "embeddings", lambda *a: calls.append(1) or (real if len(calls) < 3 else stop)(*a)
    )
    with pytest.raises(KeyboardInterrupt):
        gk.rank.truncate(model, TEXT, min_cosine=0.99)
    assert torch.equal(states(model), before)


def test_memory_of_the_calibration_does_not_grow_with_the_text(saved):
    """After every run of the model the same numbers are held, [D, D] a layer: nothing of the tokens that went by."""
    model = AutoModel.from_pretrained(saved("bert")).eval()
    held = []

    def count(*_):
        gc.collect()
        # not the fake ones that a compiled test may have left: they hold nothing
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors
                    if x.is_floating_point() and x.device.type == "cpu"}  # fmt: skip
        held.append(sum(storages.values()))

    hook = model.encoder.layer[-1].register_forward_hook(count)
    gk.rank.truncate(model, [sentence[:40] for sentence in TEXT * 4], rank=6)
    hook.remove()
    assert len(held) == 6 and len(set(held)) == 1, held


def test_what_is_refused(saved, tmp_path, capsys):
    model = made("bert")
    for arguments, message in (
        ({}, "expected one of them"),
        ({"rank": 3, "energy": 0.5}, "expected one of them"),
        ({"energy": 1.5}, "energy: expected a share"),
        ({"min_cosine": 0.9}, "calibration: expected text for min_cosine"),
        ({"rank": 3, "calibration": TEXT}, "text: expected a model loaded from a directory"),
        (
            {"rank": 3, "calibration": [{}]},
            "calibration: expected text .* a list of dict; .* given as moments=",
        ),
        ({"rank": 3, "calibration": TEXT, "moments": [{}]}, "calibration, moments: expected one of them"),
        ({"min_cosine": 0.9, "moments": [{}]}, "calibration: expected text for min_cosine"),
        ({"min_cosine": 1.1, "calibration": TEXT}, r"min_cosine: expected a cosine in \(0, 1\], got 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.rank.truncate(model, **arguments)
    with pytest.raises(ValueError, match="aware: expected True or False, got list; .* given as moments="):
        Truncate(3, aware=[{}])
    with pytest.raises(ValueError, match="aware, moments: expected one of them, got both"):
        Truncate(3, aware=True, moments=[{}])
    with pytest.raises(ValueError, match="even number, since rotary"):
        gk.rank.truncate(made("llama"), rank=3)
    normed = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    for goal in ({"rank": 4}, {"energy": 0.9}):
        with pytest.raises(ValueError, match="rank: expected scores .* it normalises queries and keys"):
            gk.rank.truncate(normed, **goal)
    for shared, terms in ((False, ["c2p"]), (True, ["p2c"])):
        positions = {"relative_attention": True, "pos_att_type": terms, "share_att_key": shared}
        deberta = DebertaV2Config(num_hidden_layers=1, **positions).to_dict()
        with pytest.raises(ValueError, match="rank: expected scores .* with vectors of position"):
            Truncate(2).plan(deberta)
    source = saved("bert")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(
        "Ein S\xe4tzchen, das nicht in UTF-8 geschrieben steht.".encode("latin-1")
    )
    for name, message in (
        ("empty", "text: expected sentences"),
        ("latin", "text: expected a UTF-8 text file"),
    ):
        for goal in (["--rank", "4"], ["--energy", "0.9"], ["--min-cosine", "0.9"]):
            line = ["convert", source, tmp_path / "out", *goal, "--calibration", tmp_path / f"{name}.txt"]
            assert main([*map(str, line)]) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert AutoConfig.from_pretrained(source).model_type == "bert"


def test_positions_that_go_through_the_same_projections():
    """What content asks of positions is a matter of W_Q W_Kᵀ where both share W_K: of rank 6, it loses nothing at 6."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50}
    positions = {"relative_attention": True, "pos_att_type": ["c2p"], "share_att_key": True}
    model = DebertaV2Model(DebertaV2Config(num_hidden_layers=2, **sizes, **positions)).double().eval()
    for layer in model.encoder.layer:
        projections = layer.attention.self
        torch.nn.init.normal_(projections.key_proj.bias)
        projections.query_proj.weight.data.unflatten(0, (4, 8))[:, 5] = 0
        projections.query_proj.weight.data.unflatten(0, (4, 8))[:, 2] = 0
        projections.query_proj.bias.data.unflatten(0, (4, 8))[:, [2, 5]] = 0
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model(**inputs).last_hidden_state
    gk.rank.truncate(model, rank=6)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=0, atol=1e-12)
    gk.rank.truncate(model, rank=4)
    assert (model(**inputs).last_hidden_state - expected).abs().max() > 1e-6


def test_rank_then_gauge_through_the_engine(saved, tmp_path):
    source = saved("gpt2")
    truncate = gk.rank.Truncate(4)
    report = convert(source, tmp_path / "out", [truncate, GaugeFix(key_ranks=[[4] * 4] * 2)])
    assert report["steps"][1]["removed"]["query_key"] == 2 * 4 * 16
    assert report["parameters_before"] - report["parameters_after"] == sum(
        step["removed"]["total"] for step in report["steps"]
    )


@pytest.mark.parametrize("goal", [{"rank": 5}, {"energy": 0.9}])
def test_moments_take_the_place_of_text(goal, saved):
    source = saved("bert")
    model, twin = (AutoModel.from_pretrained(source).eval() for _ in range(2))
    moments = gk.statistics.observe(model, TEXT)
    by_text = gk.rank.truncate(model, TEXT, **goal)
    assert gk.rank.truncate(twin, moments=moments, **goal).fields == by_text.fields
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    prepared = gk.rank.prepare(source, moments=moments, **goal)
    assert prepared.moments is moments and not prepared.needs_statistics
    assert prepared.of(model.config.to_dict()) == by_text["ranks"]
