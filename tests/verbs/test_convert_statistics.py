"""A rewrite that asks for statistics is given its layer's, and a kill does not cost the pass a second time."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402
from gaugekit.calibration import streaming  # noqa: E402
from gaugekit.checkpoint.reader import Checkpoint  # noqa: E402
from gaugekit.rewrite import Rewrite  # noqa: E402
from gaugekit.verbs.convert import convert  # noqa: E402

TEXT = "A rewrite may ask for text, and the engine reads it once. " * 20


class CentreKeys(Rewrite):
    """b_K = −E[x] W_K: keys of mean zero over the text. It moves along the key-bias orbit, so it is exact."""

    name = "centre"
    needs_statistics = ("q", "o")

    def __init__(self, stop=None):
        self.stop, self.means = stop, []

    def plan(self, config):
        return {"total": 0}

    def layer(self, view, statistics=None):
        if len(self.means) == self.stop:
            raise KeyboardInterrupt
        mean = statistics["q"].mean
        assert statistics["o"].second.shape == (32, 32) and statistics["q"].count > 40
        self.means.append(mean)
        return replace(view, k=replace(view.k, bias=-torch.einsum("d,hdk->hk", mean, view.k.weight)))


@pytest.fixture
def source(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "m")
    tiny.add_tokenizer(tmp_path / "m")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "m"


def test_statistics_reach_their_layer(source, tmp_path):
    rewrite = CentreKeys()
    report = convert(source, tmp_path / "out", [rewrite], calibration=tmp_path / "text.txt")
    assert report["invariance_error"] < 1e-13
    expected = streaming.collect(source, tmp_path / "text.txt")
    assert len(rewrite.means) == 2
    for mean, layer in zip(rewrite.means, expected, strict=True):
        assert torch.equal(mean, layer["q"].mean)
    assert not torch.equal(rewrite.means[0], rewrite.means[1])
    out = Checkpoint(tmp_path / "out").read("encoder.layer.1.attention.self.key.bias")
    weight = Checkpoint(source).read("encoder.layer.1.attention.self.key.weight").double()
    torch.testing.assert_close(out, -(weight @ rewrite.means[1]).float())
    assert not [path.name for path in (tmp_path / "out").iterdir() if "scratch" in path.name]


def test_the_pass_is_not_made_again_after_a_kill(source, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [CentreKeys(stop=1)], calibration=tmp_path / "text.txt")
    monkeypatch.setattr(streaming.Pass, "layer", None)  # a pass would call it
    rewrite = CentreKeys()
    convert(source, tmp_path / "out", [rewrite], calibration=tmp_path / "text.txt")
    assert len(rewrite.means) == 2
    with pytest.raises(TypeError):
        convert(source, tmp_path / "other", [CentreKeys()], calibration=tmp_path / "text.txt")
