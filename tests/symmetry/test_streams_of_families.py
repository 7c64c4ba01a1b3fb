"""As ``test_whole_models``, of families with towers, two stacks, norms behind their parts: no output moves, none is
missing."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gaugekit.models import Live  # noqa: E402
from gaugekit.symmetry import STREAM_SYMMETRIES, SYMMETRIES, put_stream, stream_of, streams_of  # noqa: E402
from stream_rows import MODELS, build, inputs, output  # noqa: E402

TOWERS = ("clip", "siglip")  # their outputs are products of unit vectors, which hide the basis of these as well
# What is there beside the groups: a number that T5 adds to all biases of position of a head, and one bias that no two
# positions have; two matrices in a row; the biases of two classifiers whose mean is taken; a token for masks, its mean
# aside; a pooling that a classifier passes by; of a projection without a bias, the last norm's in the direction that LayerNorms do not see
BESIDE = {
    "t5": 6, "t5, untied": 6, "mt5": 6, "umt5": 6, "t5's encoder": 4, "whisper's encoder": 12, "deit": 3, "dinov2": 3,
    "dinov2, registers": 3, "siglip's images": 123, "clip's images": 4, "clip's text": 4,
}  # fmt: skip
ACTING = [(m, i, g) for m, (*_, views) in MODELS.items() for i, groups in enumerate(views) for g in groups]


def answer(model):
    with torch.no_grad():
        return output(model(**inputs(model)))


def moved_by(model, before):
    return float((answer(model) - before).norm() / before.norm())


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_formulas(name):
    model = build(name, seed=1)
    _, _, _, attention, streams = MODELS[name]
    live = Live(model)
    views = [live.attention(layer) for layer in range(len(live))]
    found = {name: sum(map(group.dimension, views)) for name, group in SYMMETRIES.items()}
    assert {name: size for name, size in found.items() if size} == attention
    for view, expected in zip(streams_of(model), streams, strict=True):
        found = {name: group.dimension(view) for name, group in STREAM_SYMMETRIES.items()}
        assert {name: size for name, size in found.items() if size} == expected


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TOWERS])
def test_no_freedom_of_the_model_is_missing(name, monkeypatch):
    """The nullity of the Jacobian of the output with respect to every parameter is the sum of all dimensions."""
    softmax = torch.nn.functional.softmax  # eager attention takes it in float32
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
    model = build(name, seed=1)
    model.set_attn_implementation("eager")
    parameters = {path: parameter.detach() for path, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters.values()]
    read = inputs(model, rows=2 * sum(sizes) // answer(model)[0].numel() + 8)

    def outputs(flat):
        pieces = zip(parameters, flat.split(sizes), parameters.values(), strict=True)
        moved = {path: piece.view_as(parameter) for path, piece, parameter in pieces}
        return output(torch.func.functional_call(model, moved, kwargs=read)).flatten()

    flat = torch.cat([parameter.flatten() for parameter in parameters.values()])
    spectrum = torch.linalg.svdvals(torch.func.jacfwd(outputs)(flat))
    _, _, _, attention, streams = MODELS[name]
    expected = sum(map(sum, (groups.values() for groups in (attention, *streams)))) + BESIDE.get(name, 0)
    assert int((spectrum < 1e-12 * spectrum[0]).sum()) == expected


@pytest.mark.parametrize("name, index, group", ACTING)
def test_a_random_element_leaves_the_output_unchanged_and_one_outside_does_not(name, index, group):
    symmetry, model = STREAM_SYMMETRIES[group], build(name)
    before, view = answer(model), streams_of(model)[index]
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
    changed = [path for path, tensor in moved.tensors.items() if not torch.equal(tensor, view.tensors[path])]
    assert len(changed) > 1
    put_stream(model, moved)
    assert moved_by(model, before) <= 1e-12
    assert symmetry.contains(view, moved)
    for other in STREAM_SYMMETRIES.values():
        if other.dimension(view) and other.name != group:
            assert not other.contains(view, moved), other.name
    for path in changed[-1:]:
        by = torch.arange(4, dtype=torch.float64) if group == "stream_means" and path.endswith("bias") else 0
        outside = view.with_tensors({path: moved.tensors[path] + by})
        put_stream(model, outside)
        if group != "stream_means":  # each of its changes is a symmetry by itself
            assert moved_by(model, before) > 1e-6 and not symmetry.contains(view, outside)


@pytest.mark.parametrize("name, index, group", ACTING)
def test_fix_is_one_point_of_the_orbit(name, index, group):
    symmetry, model = STREAM_SYMMETRIES[group], build(name)
    before, view = answer(model), streams_of(model)[index]
    fixed = symmetry.fix(view)
    put_stream(model, fixed)
    assert moved_by(model, before) <= 1e-12 and symmetry.contains(view, fixed)
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
    for start in (fixed, moved):
        for path, tensor in symmetry.fix(start).tensors.items():
            torch.testing.assert_close(tensor, fixed.tensors[path], rtol=1e-8, atol=1e-8)
