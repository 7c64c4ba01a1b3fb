"""A sliced student, whose hidden states are in bases of its own, heals towards what its teacher foretells."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.cli import main
from gaugekit.hf import loading
from gaugekit.verbs.heal import heal, heal_directory
from sliceable import WORDS, save

TEXT = [WORDS[start : start + 40] for start in range(48)]
FAST = {"steps": 8, "batch_size": 8, "learning_rate": 3e-3}


@pytest.fixture(scope="module", params=["llama tied", "opt untied"])
def home(request, tmp_path_factory):
    """(teacher's directory, the sliced one's, text)."""
    folder = tmp_path_factory.mktemp("home")
    source, text = save(request.param, folder)
    sizes = dict(window=32, windows=4, dtype="float32", head=request.param == "opt untied")
    gk.slicing.slice(source, folder / "sliced", 0.5, calibration=text, **sizes)
    return source, folder / "sliced", text


def pair(home):
    return [loading.model(path, torch.float32) for path in (home[1], home[0])]


def divergence(student, teacher, tokenizer, sentences):
    """Mean KL(teacher ‖ student) over every token, sentence by sentence, without padding."""
    total, count = 0.0, 0
    with torch.no_grad():
        for sentence in sentences:
            ids = torch.tensor([tokenizer(sentence)["input_ids"]])
            p, q = (model(input_ids=ids).logits[0].double().softmax(-1) for model in (teacher, student))
            total += float((p * (p.log() - q.log())).sum())
            count += ids.shape[1]
    return total / count


def test_it_comes_closer_and_its_embeddings_stay(home):
    student, teacher = pair(home)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    taught = {name: tensor.clone() for name, tensor in teacher.named_parameters()}
    tokenizer = loading.tokenizer(home[0])
    expected = divergence(student, teacher, tokenizer, TEXT[::8])
    report = heal(student, teacher, TEXT, **FAST)
    assert report["divergence_before"] == report["curve"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert report["divergence_after"] == pytest.approx(
        divergence(student, teacher, tokenizer, TEXT[::8]), rel=1e-4
    )
    assert report["divergence_after"] < 0.9 * report["divergence_before"]
    assert [row["step"] for row in report["curve"]] == list(range(9)) and report["steps"] == 8
    assert {row["stage"] for row in report["curve"]} == {"before", "end to end"}
    moved = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
    tables = {name for name in before if name.endswith(("embed_tokens.weight", "embed_positions.weight"))}
    keys = {name for name in before if name.endswith("k_proj.bias")}  # no output depends on them
    assert moved | keys == before.keys() - tables | keys and tables
    assert any(name.endswith("shortcut.packed") for name in moved)
    assert report["parameters"] == sum(before[name].numel() for name in before.keys() - tables)
    assert all(torch.equal(tensor, taught[name]) for name, tensor in teacher.named_parameters())
    assert "nats a token" in str(report) and "agreement" in str(report)


def test_a_directory_heals_and_loads(home, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A quick brown fox jumps over all of the lazy dogs there.\n\n" * 3
                                       + "Pack my box with five dozen liquor jugs, said he to the fox.")  # fmt: skip
    line = ["heal", home[1], home[0], tmp_path / "out", "--text", tmp_path / "text.txt", "--steps", "4"]
    assert main([*map(str, line), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 4 and report["divergence_after"] != report["divergence_before"]
    healed, sliced = Checkpoint(tmp_path / "out"), Checkpoint(home[1])
    assert set(healed.names()) == set(sliced.names())
    assert any(not torch.equal(healed.read(name), sliced.read(name)) for name in healed.names())
    model = loading.model(tmp_path / "out", torch.float32)
    assert gk.perplexity(model, home[2], window=32, most=2) != gk.perplexity(
        loading.model(home[1], torch.float32), home[2], window=32, most=2
    )


def test_only_what_patterns_name_is_trained(home):
    student, teacher = pair(home)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    report = heal(student, teacher, TEXT, **FAST, parameters=["*shortcut*"])
    moved = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "shortcut" in name}
    assert report["parameters"] == sum(before[name].numel() for name in moved)


def test_what_does_not_fit_is_refused(home, tmp_path):
    student, teacher = pair(home)
    with pytest.raises(
        ValueError, match="layer_steps: expected 0, as a sliced student has bases of its own, got 2"
    ):
        heal(student, teacher, TEXT, steps=4, layer_steps=2)
    with pytest.raises(ValueError, match="parameters: expected patterns"):
        heal(student, teacher, TEXT, **FAST, parameters=["nothing"])
    base = teacher.base_model
    base.name_or_path = teacher.name_or_path
    with pytest.raises(ValueError, match="teacher: expected a causal language model"):
        heal(student, base, TEXT, **FAST)
    with pytest.raises(ValueError, match="2 sentences"):
        heal_directory(home[1], home[0], tmp_path / "out", ["One."])
