"""``drop="auto"``: the columns of a polar form go that text held out can spare."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk
from gaugekit.hf import loading
from gaugekit.slicing import threshold
from sliceable import save

SIZES = dict(window=32, windows=8)


def test_the_threshold_is_chosen_by_text_that_was_not_calibrated_on(tmp_path):
    """Each trial is the model of that threshold; the least loss is taken."""
    source, text = save("llama", tmp_path)
    options = dict(calibration=text, rotation="polar", work_directory=tmp_path / "bases", **SIZES)
    report = gk.slicing.slice(source, tmp_path / "auto", 0.25, drop="auto", **options)
    step = report["steps"][0]
    trials = {row["drop"]: row for row in step["trials"]}
    assert tuple(trials) == threshold.DROPS and len({row["rank"] for row in trials.values()}) > 2
    ids = loading.tokenizer(source)(text.read_text())["input_ids"]
    held_out = torch.tensor([ids[start : start + 32] for start in range(8 * 32, 16 * 32, 32)])
    for drop in (0.0, 0.1, 0.4):
        out = tmp_path / str(drop)
        gk.slicing.slice(source, out, 0.25, drop=drop, **options)
        ranks = loading.config(out).quantization_config["sliced"]["ranks"]
        assert sum(ranks) == pytest.approx(3 * trials[drop]["rank"])
        with torch.no_grad():
            logits = loading.model(out, torch.float32)(held_out).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert float(loss) == pytest.approx(trials[drop]["loss"], rel=1e-5)
    least = min(row["loss"] for row in step["trials"])
    assert trials[step["drop"]]["loss"] == least and f"{least:.4f}" in str(report)
    page = (tmp_path / "auto" / "report.html").read_text()
    assert f"{step['drop']:g}, taken" in page and f"{least:.4f}" in page
    assert not list((tmp_path / "auto").glob("**/trials.json"))


def test_a_choice_that_was_stopped_goes_on(tmp_path, monkeypatch):
    source, text = save("llama", tmp_path)
    options = dict(calibration=text, rotation="polar", drop="auto", **SIZES)
    expected = gk.slicing.slice(source, tmp_path / "a", 0.25, **options)
    trials = threshold.trials

    def stopped(*given):
        trials(*given)
        raise KeyboardInterrupt

    for place in ("trials", "best"):
        with monkeypatch.context() as patch:
            patch.setattr(threshold, place, stopped if place == "trials" else lambda rows: 1 / 0)
            with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
                gk.slicing.slice(source, tmp_path / "b", 0.25, **options)
    monkeypatch.setattr(threshold, "trials", lambda *_: pytest.fail("what was found is kept"))
    assert gk.slicing.slice(source, tmp_path / "b", 0.25, **options)["steps"] == expected["steps"]
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.safetensors")} for out in "ab"
    ]
    assert files[0] == files[1]


def test_of_equal_losses_the_threshold_that_drops_most():
    rows = [{"drop": 0.0, "loss": 2.0}, {"drop": 0.1, "loss": 1.0}, {"drop": 0.2, "loss": 1.0}]
    assert threshold.best(rows) == 0.2
