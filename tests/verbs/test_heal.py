"""Healing: it wins back what a truncation lost, leaves what is gone gone, and an interruption changes nothing."""

import copy
import json
import sys

import pytest
import torch
from transformers import AutoModel

import gaugekit as gk
from gaugekit import samples
from gaugekit.cli import main
from gaugekit.models import Live
from gaugekit.verbs.heal import heal, heal_directory
from tiny import add_tokenizer, bert, gpt2, save_spread

TEXT = samples.sentences(24)
FAST = {"steps": 8, "layer_steps": 4, "batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    def save(make):
        torch.manual_seed(1)
        return save_spread(make(), tmp_path_factory.mktemp("models") / make.__name__)

    return {make.__name__: save(make) for make in (bert, gpt2)}


def pair(path, rank=2):
    teacher = AutoModel.from_pretrained(path).eval()
    student = AutoModel.from_pretrained(path).eval()
    gk.rank.truncate(student, rank=rank)
    return student, teacher


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_it_heals_and_what_is_gone_stays_gone(home, kind):
    student, teacher = pair(home[kind])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    flags = [parameter.requires_grad for parameter in student.parameters()]
    report = heal(student, teacher, TEXT, **FAST)
    curve = report["curve"]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert report["mean_cosine_after"] > report["mean_cosine_before"]
    assert [row["step"] for row in curve] == list(range(13))
    assert [view.ranks for view in map(Live(student).attention, range(2))] == [[2] * 4] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    trained = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert trained and all("query" in name or "key" in name or "c_attn" in name for name in trained)


def test_a_fused_student_heals(home):
    student, teacher = pair(home["bert"])
    gk.fuse(student)
    report = heal(student, teacher, TEXT, **FAST)
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"]
    assert heal(student, teacher, TEXT, **{**FAST, "parameters": ["encoder.layer.1.*"]})["parameters"] > 0


def test_what_is_held_out_is_an_eighth_and_bounded(home, monkeypatch):
    student, teacher = pair(home["bert"])
    read, module = [], sys.modules["gaugekit.verbs.heal"]
    real = module.tokens
    monkeypatch.setattr(
        module, "tokens", lambda model, text, size: read.append(len(text)) or real(model, text, size)
    )
    for bound, held_out in ((256, 3), (2, 2)):
        monkeypatch.setattr(module.HiddenStates, "held_out", bound)
        heal(student, teacher, TEXT, steps=0, layer_steps=0)
        assert read[-2:] == [held_out, len(TEXT) - held_out]


class Stop(BaseException):
    """Ends a call in the middle."""


@pytest.mark.parametrize("at", [2, 7])
def test_interrupted_and_resumed_is_uninterrupted(home, tmp_path, at):
    student, teacher = pair(home["bert"])
    other, whole = copy.deepcopy(student), copy.deepcopy(student)
    for model in (other, whole):
        model.name_or_path = student.name_or_path
    expected = heal(whole, teacher, TEXT, **FAST)

    def stop(done, total):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        heal(student, teacher, TEXT, **FAST, work_directory=tmp_path / "work", progress=stop)
    found = heal(other, teacher, TEXT, **FAST, work_directory=tmp_path / "work")
    assert found.fields == expected.fields
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds the work of another call .*seed differs"):
        heal(other, teacher, TEXT, **{**FAST, "seed": 1}, work_directory=tmp_path / "work")


def test_a_work_directory_knows_its_models(home, tmp_path):
    """Another student or teacher of equal names and shapes is refused; an equal one from elsewhere goes on."""
    student, teacher = pair(home["bert"])
    other, moved = pair(home["bert"], rank=3)[0], copy.deepcopy(student)
    heal(student, teacher, TEXT, **FAST, work_directory=tmp_path / "work")
    taught = copy.deepcopy(teacher)
    with torch.no_grad():
        taught.encoder.layer[1].output.dense.bias[0] += 1
    moved.name_or_path = other.name_or_path = taught.name_or_path = teacher.name_or_path
    before = [parameter.clone() for parameter in other.parameters()]
    for a, b, what in (
        (other, teacher, "student"),
        (moved, taught, "teacher"),
        (student, teacher, "student"),
    ):
        with pytest.raises(ValueError, match=f"work_directory: .* another call .*digests {what}"):
            heal(a, b, TEXT, **FAST, work_directory=tmp_path / "work")
    assert all(torch.equal(x, y) for x, y in zip(other.parameters(), before, strict=True))
    steps = []
    heal(
        moved,
        teacher,
        TEXT,
        **FAST,
        work_directory=tmp_path / "work",
        progress=lambda *now: steps.append(now),
    )
    assert steps == []
    assert all(torch.equal(x, y) for x, y in zip(moved.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("name", ["heal.pt", "heal.pt.tmp", "notes.txt"])
def test_a_folder_that_is_not_ours_is_left_alone(home, tmp_path, name):
    student, teacher = pair(home["bert"])
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="work_directory: expected .* to be free"):
        heal(student, teacher, TEXT, **FAST, work_directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_directory_goes_on_and_refuses_another_student(home, tmp_path):
    for rank in (2, 3):
        gk.convert(home["bert"], tmp_path / f"small{rank}", [gk.rank.Truncate(rank)])
    arguments = home["bert"], tmp_path / "out", TEXT
    heal_directory(tmp_path / "small2", home["bert"], tmp_path / "whole", TEXT, **FAST)

    def stop(done, total):
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        heal_directory(tmp_path / "small2", *arguments, **FAST, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match="unfinished work of another call .digests student model.safetensors"
    ):
        heal_directory(tmp_path / "small3", *arguments, **FAST)
    steps = []
    report = heal_directory(
        tmp_path / "small2", *arguments, **FAST, progress=lambda done, _: steps.append(done)
    )
    assert steps[0] > 1 and report["curve"][-1]["step"] == 12
    whole, out = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")
    )
    assert whole == out and "gaugekit_manifest.json" not in out
    assert not (tmp_path / "out.partial").exists()


def test_on_the_command_line(home, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    assert main(["convert", str(home["bert"]), str(tmp_path / "small"), "--rank", "2", "--json"]) == 0
    capsys.readouterr()
    line = ["heal", tmp_path / "small", home["bert"], tmp_path / "out", "--text", tmp_path / "text.txt"]
    assert main([*map(str, line), "--steps", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["curve"][-1]["step"] == report["steps"] == 5
    found = {}
    for name in ("small", "out"):
        compare = ["verify", home["bert"], tmp_path / name, "--text", tmp_path / "text.txt", "--pool", "mean"]
        assert main([*map(str, compare), "--json"]) == 1  # approximate, before and after
        found[name] = json.loads(capsys.readouterr().out)
    assert found["out"]["relative_error"] < found["small"]["relative_error"] and found["out"]["rows"] == len(
        TEXT
    )
    healed = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert healed.encoder.layer[0].attention.self.query.ranks == [2] * 4
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out.partial").exists()
    # the student's certificate speaks of weights that are no longer these
    assert (tmp_path / "small" / "gaugekit_certificate.json").is_file()
    assert not [path.name for path in (tmp_path / "out").iterdir() if "gaugekit" in path.name]


def test_a_student_in_shards_heals_into_a_whole_directory(home, tmp_path):
    gk.convert(home["bert"], tmp_path / "small", [gk.rank.Truncate(2)], dense=True)
    model = AutoModel.from_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    add_tokenizer(tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    heal_directory(tmp_path / "shards", home["bert"], tmp_path / "out", TEXT, **FAST)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    AutoModel.from_pretrained(tmp_path / "out")


def test_bad_arguments(home):
    student, teacher = pair(home["bert"])
    for changes, message in (
        ({"steps": -1}, "steps: expected an integer from 0"),
        ({"parameters": ["nothing"]}, "parameters: expected patterns"),
        ({"text": []}, "text: expected sentences"),
        ({"text": ["One."]}, "at least 2 sentences"),
    ):
        with pytest.raises(ValueError, match=message):
            heal(student, teacher, **{"text": TEXT, **changes})
    shallow = bert(num_hidden_layers=1)
    with pytest.raises(ValueError, match="student: expected 2 blocks"):
        heal(shallow, teacher, TEXT)
