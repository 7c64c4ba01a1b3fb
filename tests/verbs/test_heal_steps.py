"""What one step of healing does: its size, the gradient it is taken along, and which hidden states it answers for."""

import contextlib
import math
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModel

from gaugekit import samples
from gaugekit.hf import loading
from gaugekit.verbs.heal import heal, heal_directory
from tiny import add_tokenizer, bert, save_spread

TEXT = [sentence[: 12 + index] for index, sentence in enumerate(samples.sentences(24))]
HELD_OUT = TEXT[::8]
RATE = 1e-3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.manual_seed(1)
    return save_spread(bert(num_hidden_layers=3), tmp_path_factory.mktemp("models"))


def pair(home):
    return AutoModel.from_pretrained(home).eval(), AutoModel.from_pretrained(home).eval()


def disturb(student, *patterns, by=0.1):
    """Adds noise to the weights whose names hold one of the patterns."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if any(pattern in name for pattern in patterns):
                parameter.add_(by * torch.randn_like(parameter))


class Stop(BaseException):
    """Ends a call in the middle."""


@contextlib.contextmanager
def steps_seen():
    """One row for each step of an optimizer: learning rate, weight decay, and the norm of all its gradients."""
    seen = []

    def look(optimizer, arguments, named):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["weight_decay"], norm))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def test_warm_up_then_a_cosine_to_zero(home):
    """A tenth of a stage's steps warm up, 1/w, 2/w, … 1; then ½ (1 + cos π t) with t from 0 towards 1."""
    student, teacher = pair(home)
    disturb(student, "query", "key")
    with steps_seen() as seen:
        heal(student, teacher, TEXT[:4], steps=20, layer_steps=10, learning_rate=RATE)
    rates = [rate / RATE for rate, _, _ in seen]
    layers, ends = rates[:10], rates[10:]
    assert len(ends) == 20
    # 10 steps: one warms up; t = 0, 1/9, …; cos(π/3) = ½ at the fourth after it, cos(2π/3) = −½ at the seventh
    assert layers[0] == 1 and layers[1] == 1
    assert layers[4] == pytest.approx(0.75) and layers[7] == pytest.approx(0.25)
    # 20 steps: two warm up; t = 0, 1/18, …; π/3 at the sixth after them, π/2 at the ninth, 2π/3 at the twelfth
    assert ends[:3] == [0.5, 1, 1]
    assert [ends[2 + after] for after in (6, 9, 12)] == pytest.approx([0.75, 0.5, 0.25])
    assert ends[-1] == pytest.approx(0.5 * (1 - math.cos(math.pi / 18)))
    assert all(decay == 0 for _, decay, _ in seen)


@pytest.mark.parametrize("layer_steps, steps", [(20, 0), (0, 20)])
def test_the_first_step_of_a_stage_moves_half_as_far_as_the_second(home, layer_steps, steps):
    """AdamW with fresh moments moves every number by its rate, whatever the gradient: half the rate of the peak while
    the first of two steps warms up.
    """
    student, teacher = pair(home)
    disturb(student, "query", "key")
    before = student.encoder.layer[1].attention.self.query.weight.detach().clone()

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        heal(
            student,
            teacher,
            TEXT,
            layer_steps=layer_steps,
            steps=steps,
            learning_rate=RATE,
            progress=stop,
        )
    moved = (student.encoder.layer[1].attention.self.query.weight.detach() - before).abs()
    assert moved.max().item() == pytest.approx(RATE / 2, rel=1e-3)
    assert moved.median().item() == pytest.approx(RATE / 2, rel=1e-2)


def test_a_stage_starts_with_fresh_moments(home):
    """The first step end to end is as long as its rate, whatever the layers' steps left in the optimizer."""
    student, teacher = pair(home)
    disturb(student, "query", "key")
    places = {}

    def keep(done, total):
        places[done] = student.encoder.layer[1].attention.self.query.weight.detach().clone()
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        heal(student, teacher, TEXT, layer_steps=3, steps=20, learning_rate=RATE, progress=keep)
    moved = (places[4] - places[3]).abs()
    assert moved.median().item() == pytest.approx(RATE / 2, rel=1e-2)


def test_gradients_are_clipped_to_norm_one(home):
    """A student far off has gradients far above 1; what the optimizer is given is of norm 1, no more."""
    student, teacher = pair(home)
    disturb(student, "attention.self", "output.dense.weight", by=1.0)
    with steps_seen() as seen:
        heal(
            student, teacher, TEXT, parameters=["*"], steps=2, layer_steps=2, batch_size=4, learning_rate=1e-6
        )
    assert [norm for _, _, norm in seen] == pytest.approx([1.0] * 4, rel=1e-4)


def test_a_small_gradient_is_not_stretched(home):
    student, teacher = pair(home)
    disturb(student, "layer.2.attention.self.query", by=1e-3)
    with steps_seen() as seen:
        heal(student, teacher, TEXT, steps=1, layer_steps=1, learning_rate=1e-9)
    assert all(0 < norm < 0.1 for _, _, norm in seen)


def assert_healed(student, teacher, parameters):
    report = heal(student, teacher, TEXT, parameters=[parameters], steps=8, layer_steps=0, learning_rate=1e-2)
    losses = [row["loss"] for row in report["curve"]]
    assert losses[0] > 1e-3 and losses[-1] < 0.8 * losses[0]


def test_only_the_last_hidden_state_is_off(home):
    """What enters no hidden state but the last is healed all the same."""
    student, teacher = pair(home)
    disturb(student, "layer.2.output.dense")
    assert_healed(student, teacher, "encoder.layer.2.output.dense.*")


def test_only_an_earlier_hidden_state_is_off(home):
    """The last block takes what it is given times zero, so that the last states agree; the earlier ones still count."""
    student, teacher = pair(home)
    with torch.no_grad():
        for model in (student, teacher):
            model.encoder.layer[2].output.LayerNorm.weight.zero_()
            model.encoder.layer[2].output.LayerNorm.bias.normal_(generator=torch.Generator().manual_seed(0))
    disturb(student, "layer.1.output.dense")
    assert_healed(student, teacher, "encoder.layer.1.output.dense.*")


def test_the_loss_by_its_formula(home):
    """Σ_l ‖y_l − y_l*‖² / ‖y_l* − mean y_l*‖² over real tokens, the last layer counted as much as all others together:
    e₃ + (e₁ + e₂) / 2; the cosines are those of the means over real tokens.
    """
    student, teacher = pair(home)
    disturb(student, "query", "key", "output.dense")
    report = heal(student, teacher, TEXT, steps=0, layer_steps=0)
    (row,) = report["curve"]
    assert row["stage"] == "before" and row["step"] == 0
    found, goals = [], []
    for ids in samples.tokenize(loading.tokenizer(home), HELD_OUT, 512):  # one by one: nothing pads
        with torch.no_grad():
            for model, states in ((student, found), (teacher, goals)):
                out = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
                states.append([state[0].double() for state in out])
    assert len({len(states[0]) for states in goals}) > 1, "sentences of one length would pad nothing"
    errors = []
    for layer in range(3):
        y, goal = (torch.cat([states[layer] for states in model]) for model in (found, goals))
        errors.append((y - goal).square().sum() / (goal - goal.mean(0)).square().sum())
    assert row["loss"] == pytest.approx((errors[2] + (errors[0] + errors[1]) / 2).item(), rel=1e-4)
    cosines = torch.stack(
        [
            torch.cosine_similarity(y[2].mean(0), goal[2].mean(0), dim=0)
            for y, goal in zip(found, goals, strict=True)
        ]
    )
    assert row["mean_cosine"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert row["min_cosine"] == pytest.approx(cosines.min().item(), rel=1e-5)
    assert row["min_cosine"] < row["mean_cosine"]


def test_an_error_in_one_layer_teaches_no_other(home):
    """Layer by layer a block is given what the teacher's was given: one that is right already does not move."""
    student, teacher = pair(home)
    disturb(student, "layer.0.")
    healed = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    heal(student, teacher, TEXT, parameters=["encoder.layer.*"], steps=0, layer_steps=3, learning_rate=RATE)
    moved = {
        name.split(".")[2]
        for name, parameter in student.named_parameters()
        if not torch.equal(parameter, healed[name])
    }
    assert moved == {"0"}


def test_two_sentences_are_enough(home):
    """One is held out and draws the curve, one trains; a quarter as many steps go layer by layer as end to end."""
    student, teacher = pair(home)
    disturb(student, "query", "key")
    report = heal(student, teacher, TEXT[:2], steps=4, learning_rate=RATE)
    assert report["steps"] == 5 and [row["stage"] for row in report["curve"]] == [
        "before",
        "layers",
        *["end to end"] * 4,
    ]
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"]


def test_a_directory_goes_on_where_it_was_ended(home, tmp_path):
    """The state is kept after every one of eight steps: ended in the third, two are not taken again."""
    student, _ = pair(home)
    disturb(student, "query", "key")
    student.save_pretrained(tmp_path / "student")
    add_tokenizer(tmp_path / "student")
    options = {"text": TEXT, "steps": 8, "layer_steps": 0, "learning_rate": RATE}

    def stop(done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        heal_directory(tmp_path / "student", home, tmp_path / "out", progress=stop, **options)
    assert not (tmp_path / "out").exists()
    seen = []
    heal_directory(
        tmp_path / "student", home, tmp_path / "out", progress=lambda *now: seen.append(now), **options
    )
    assert seen == [(step, 8) for step in range(3, 9)]
    heal_directory(tmp_path / "student", home, tmp_path / "whole", **options)
    out, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert out.keys() == whole.keys() and all(torch.equal(out[name], whole[name]) for name in out)


def test_a_disk_without_room_for_the_result_is_refused_before_any_work(home, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="bytes are needed beside out, 1,000 are free"):
        heal_directory(home, home, tmp_path / "out", TEXT)
    assert list(tmp_path.iterdir()) == []
