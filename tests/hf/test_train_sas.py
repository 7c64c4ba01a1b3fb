"""The training example: a run that was stopped goes on and ends with the numbers of one that was not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_sas.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("train_sas", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, monkeypatch, out):
    options = ["--quick", "--steps", "8", "--points", "4", "--blocks", "sas", "pre_ln", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_sas.py", *options])
    example.main()
    return json.loads((out / "quick" / "train_sas.json").read_text())["runs"]


def test_a_stopped_run_goes_on(example, monkeypatch, tmp_path):
    whole = run(example, monkeypatch, tmp_path / "whole")
    save, calls = example.save, []

    def killed(state, file):
        save(state, file)
        calls.append(file)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(example, monkeypatch, tmp_path / "stopped")
    stopped = run(example, monkeypatch, tmp_path / "stopped")
    assert len(calls) == 8, "nothing is done twice"
    for one, other in zip(whole, stopped, strict=True):
        for name in ("block", "seed", "parameters", "step", "loss", "validation"):
            assert one[name] == other[name]
        assert one["step"] == [2, 4, 6, 8] and one["loss"][-1] < one["loss"][0]
    with pytest.raises(SystemExit, match="delete it or choose --out"):
        monkeypatch.setitem(example.SIZES["quick"], "batch", 2)
        run(example, monkeypatch, tmp_path / "whole")


def test_every_block_sees_the_same_batches(example):
    text = torch.arange(200, dtype=torch.uint8)
    size = {"rows": 16, "batch": 4}
    first = example.batch(text, size, 0, 5)
    assert torch.equal(first, example.batch(text, size, 0, 5))
    assert not torch.equal(first, example.batch(text, size, 0, 6))
    assert not torch.equal(first, example.batch(text, size, 1, 5))
    assert torch.equal(first[:, 1:] - first[:, :-1], torch.ones(4, 15, dtype=torch.int64))
