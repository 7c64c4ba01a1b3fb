"""``gaugekit convert --slice`` and ``gaugekit verify --perplexity``."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from gaugekit.cli import main
from sliceable import save


def test_a_model_is_sliced_and_compared(tmp_path, capsys):
    source, text = save("llama", tmp_path)
    out = tmp_path / "out"
    slicing = ["convert", str(source), str(out), "--slice", "0.25", "--calibration", str(text), "--json"]
    assert main(slicing) == 0
    fields = json.loads(capsys.readouterr().out)
    step = fields["steps"][0]
    assert step["rewrite"] == "slice" and step["claim"] == "approximate" and step["form"] == "polar"
    assert set(step["forms"]) == {"dense", "triangular", "polar"} and fields["invariance_error"] is None
    assert main(["verify", str(source), str(out), "--perplexity", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "nats a token" in printed and "agreement" in printed
    assert main([*slicing[:2], str(tmp_path / "b"), *slicing[3:-1], "--rotation", "dense", "--pack"]) == 0
    printed = capsys.readouterr().out
    assert "forms of the shortcuts" in printed and "next: gaugekit verify" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slice", "0.25"], "--slice: expected --calibration FILE"),
        (["--slice", "0.25", "--calibration", "x", "--gauge"], "--slice: expected without --gauge"),
        (["--slice", "0.25", "--calibration", "x", "--dense"], "--slice: expected without --dense"),
        (["--gauge", "--rotation", "polar"], "--rotation: expected beside --slice, got it without"),
        (["--gauge", "--drop", "0.1"], "--drop: expected beside --slice, got it without"),
        (["--slice", "0.25", "--drop", "some"], "--drop: expected a number from 0 to 1 or auto, got 'some'"),
        (["--gauge", "--slice-head"], "--slice-head: expected beside --slice, got it without"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, capsys, arguments, message):
    assert main(["convert", "model", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_perplexity_takes_no_text_of_its_own(capsys):
    assert main(["verify", "a", "b", "--perplexity", "x", "--text", "y"]) == 2
    assert "--perplexity: expected without --text" in capsys.readouterr().err
