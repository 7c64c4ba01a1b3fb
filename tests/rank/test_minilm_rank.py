"""A real model: what truncation that knows the activations costs beside plain truncation, on text it has not seen."""

import pytest

pytest.importorskip("transformers")

from pydoc_data.topics import topics

from transformers import AutoModel

import gaugekit as gk
from gaugekit import samples
from gaugekit.calibration.moments import observe, tokens
from gaugekit.rank import embeddings
from helpers import minilm


@minilm
def test_activations_matter_and_ragged_ranks_beat_uniform_ones():
    text = samples.split("\n\n".join(topics[name] for name in sorted(topics)))
    calibration, held_out = text[: len(text) // 2 : 6], text[len(text) // 2 :: 16]
    directory = samples.minilm()
    model = AutoModel.from_pretrained(directory).eval()
    batches = tokens(model, held_out, 32)
    moments, original = observe(model, calibration), embeddings(model, batches)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def truncated(known, **goal):
        model.load_state_dict(state)
        report = gk.rank.truncate(model, moments=known, **goal)
        found = embeddings(model, batches)
        away = 1 - float((found * original).sum(1).mean())
        return report, away, float((found - original).norm() / original.norm())

    for rank in (8, 16):
        _, plain, plain_relative = truncated(None, rank=rank)
        _, aware, relative = truncated(moments, rank=rank)
        assert aware <= plain / 3 and relative <= 0.5 * plain_relative, (rank, aware, plain)
    _, away, relative = truncated(moments, rank=32)
    assert away < 1e-12 and relative < 1e-6
    ragged, ragged_away, _ = truncated(moments, energy=0.975)
    _, uniform_away, _ = truncated(moments, rank=round(ragged["mean_rank"] + 0.5))
    assert ragged_away < uniform_away, (ragged["mean_rank"], ragged_away, uniform_away)
