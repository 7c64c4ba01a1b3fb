"""As ``test_whole_models``, of families with towers, two stacks, norms behind their parts: no output moves, none is
missing."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gaugekit as gk  # noqa: E402
from gaugekit.models import Live  # noqa: E402
from gaugekit.symmetry import STREAM_SYMMETRIES, SYMMETRIES, put_stream, stream_of, streams_of  # noqa: E402
from jacobian import nullity  # noqa: E402
from stream_rows import MODELS, build, inputs, output  # noqa: E402

TOWERS = (
    "clip",
    "siglip",
)  # their outputs are products of unit vectors, which hide the basis of these as well
# What is there beside the groups: a number that T5 adds to all biases of position of a head, and one bias that no two
# positions have; two matrices in a row; the biases of two classifiers whose mean is taken; a token for masks, its mean
# aside; a pooling that a classifier passes by; of a projection without a bias, the last norm's in the direction that
# LayerNorms do not see. CLIP's first norm has one number more: of the gains g whose P diag(g) P has the same singular
# values, P what takes the mean off, there is a curve. mBART has two positions more a side than a text fills
BESIDE = {
    "t5": 6, "t5, untied": 6, "mt5": 6, "umt5": 6, "t5's encoder": 4, "whisper's encoder": 12, "deit": 3, "dinov2": 3,
    "dinov2, registers": 3, "siglip's images": 123, "clip's images": 4 + 1, "clip's text": 4, "mbart": 4 * 3,
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
    model = build(name, seed=1)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    read = inputs(model, rows=2 * numbers // answer(model)[0].numel() + 8)
    _, _, _, attention, streams = MODELS[name]
    expected = sum(map(sum, (groups.values() for groups in (attention, *streams)))) + BESIDE.get(name, 0)
    assert nullity(model, read, output, monkeypatch) == expected


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
    if group == "stream_means":  # each change is one by itself: another value for each channel is none
        rows = moved.tensors[changed[0]] + torch.arange(4, dtype=torch.float64)
        outside = view.with_tensors({changed[0]: rows})
    else:
        outside = view.with_tensors({path: moved.tensors[path] for path in changed[:1]})
    put_stream(model, outside)
    assert moved_by(model, before) > 1e-6
    assert not symmetry.contains(view, outside)


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


@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5, untied"])
def test_a_config_a_file_and_a_live_model_count_the_same(name, tmp_path):
    """Files of vision transformers name their tensors otherwise. A config has no gains, and no two drawn here agree."""
    model = build(name)
    model.save_pretrained(tmp_path)
    *_, attention, streams = MODELS[name]
    expected = {}
    for groups in (attention, *streams):
        for group, size in groups.items():
            expected[group] = expected.get(group, 0) + size
    for source in (model, tmp_path, tmp_path / "config.json"):
        found = dict(gk.inspect(source)["unobservable"])
        assert found.pop("total") == sum(expected.values())
        assert {group: size for group, size in found.items() if size} == expected


def test_a_config_that_unties_its_head_counts_it(tmp_path):
    """T5 v1.1's and mT5's files say so; transformers ties the two until it has read both."""
    model = build("t5, untied")
    config = model.config.to_dict() | {"tie_word_embeddings": False, "architectures": [type(model).__name__]}
    model.save_pretrained(tmp_path)  # its config says tied
    live = gk.inspect(model)
    for counted in (gk.inspect(config), gk.inspect(tmp_path)):
        assert not any("not counted" in note for note in counted.notes)
        assert counted["parameters"] == live["parameters"] and counted["unobservable"] == live["unobservable"]


def test_a_head_without_a_view_is_told(tmp_path):
    sizes = dict(d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=3, decoder_ffn_dim=3, vocab_size=11, max_position_embeddings=8, pad_token_id=0,
                 eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
    model = transformers.MBartForSequenceClassification(transformers.MBartConfig(**sizes))
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        assert any("since 'classification_head." in note for note in gk.inspect(source).notes)
    assert not any("has no view" in note for note in gk.inspect(build("t5")).notes)


@pytest.mark.parametrize(
    ("name", "norms", "dimension"),
    [
        ("olmo2", ["layers.0.post_attention_layernorm", "layers.0.post_feedforward_layernorm"], 3),
        ("gemma2", ["layers.0.post_attention_layernorm", "layers.0.post_feedforward_layernorm", "norm"], 3),
        ("clip's images", ["pre_layrnorm"], 1),
    ],
)
def test_gains_on_the_stream_itself_are_passed_among_channels_of_the_same_alone(name, norms, dimension):
    """Of the first three channels the gains agree, not of the fourth: O(3), or O(2) where norms take the mean off."""
    rotation, model = STREAM_SYMMETRIES["stream_rotation"], build(name)
    view = streams_of(model)[0]
    assert rotation.dimension(view) == 0
    with pytest.raises(
        ValueError, match="this model has no such freedom .(it takes channels of the same|its head shares)"
    ):
        rotation.act(view, torch.eye(4, dtype=torch.float64))
    gain = torch.tensor([0.7, 0.7, 0.7, 1.4], dtype=torch.float64)
    view = view.with_tensors({f"{norm}.weight": gain for norm in norms})
    put_stream(model, view)
    before = answer(model)
    assert rotation.dimension(view) == dimension
    moved, fixed = (
        rotation.act(view, rotation.random(view, torch.Generator().manual_seed(2))),
        rotation.fix(view),
    )
    for other in (moved, fixed):
        put_stream(model, other)
        assert moved_by(model, before) <= 1e-12 and rotation.contains(view, other)
    for path, tensor in rotation.fix(moved).tensors.items():
        torch.testing.assert_close(tensor, fixed.tensors[path], rtol=1e-8, atol=1e-8)
    swap = torch.eye(4, dtype=torch.float64)[[3, 1, 2, 0]]
    with pytest.raises(ValueError, match="expected zeros between channels whose gains"):
        rotation.act(view, swap)
    if view.head == "tied":
        return
    everywhere = replace(view, stream=replace(view.stream, entries=(), junctions=bare(view)), head="own")
    put_stream(model, replace(rotation.act(everywhere, swap), stream=view.stream, head=view.head))
    assert moved_by(model, before) > 1e-3


def bare(view):
    """The junctions as if nothing stood behind their parts."""
    return tuple(tuple(replace(j, after=None) for j in junctions) for junctions in view.stream.junctions)


def test_channels_that_a_layer_scale_of_zero_hides_turn_among_each_other():
    rotation, model = STREAM_SYMMETRIES["stream_rotation"], build("dinov2")
    view = streams_of(model)[0]
    scale = torch.tensor([0.0, 1.3, 0.0, 0.0], dtype=torch.float64)
    view = view.with_tensors({"encoder.layer.0.layer_scale1.lambda1": scale})
    put_stream(model, view)
    before = answer(model)
    assert rotation.dimension(view) == 1
    writer = "encoder.layer.0.attention.o_proj.weight"
    for group in ("stream_rotation", "layer_scales", "stream_means"):
        symmetry = STREAM_SYMMETRIES[group]
        moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(2)))
        assert torch.equal(moved.tensors[writer], view.tensors[writer]) is (group == "stream_means")
        for other in (moved, symmetry.fix(view)):
            put_stream(model, other)
            assert moved_by(model, before) <= 1e-12
            # what a scale of 0 hides has no one form
            assert symmetry.contains(view, other) or (group == "layer_scales" and other is moved)


def test_what_stands_before_whispers_encoder_keeps_its_basis():
    model = build("whisper")
    encoder, decoder = streams_of(model)
    with pytest.raises(ValueError, match="no such freedom .a GELU stands before the encoder's stream"):
        STREAM_SYMMETRIES["stream_rotation"].act(encoder, torch.eye(4, dtype=torch.float64))
    assert not encoder.tensors.keys() & decoder.tensors.keys()
    with pytest.raises(ValueError, match="expected one stream, got 2; symmetry.streams_of"):
        stream_of(model)
    notes = gk.inspect(model).notes
    assert any("stream_rotation: none, since a GELU" in note for note in notes)


@pytest.mark.parametrize("name", ["clip's images", "clip"])
def test_a_tower_that_shows_its_stream_before_the_last_norm_has_no_view(name):
    kind = "CLIPVisionModel" if name != "clip" else "CLIPForImageClassification"
    _, config, sizes, _, _ = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    with pytest.raises(ValueError, match="it shows its stream before the last norm, which only a projection"):
        streams_of(model)
    assert any(
        "norms, stream and MLPs: not counted, since it shows its stream" in n for n in gk.inspect(model).notes
    )


def test_streams_that_heads_read_at_every_layer_have_no_view():
    _, config, sizes, _, _ = MODELS["whisper"]
    config = getattr(transformers, config)(**{**sizes, "use_weighted_layer_sum": True})
    with pytest.raises(ValueError, match="use_weighted_layer_sum: expected false, got true"):
        streams_of(transformers.WhisperForAudioClassification(config))


def test_the_end_of_an_encoder_s_stream_is_read_by_every_cross_attention():
    """T5's streams begin in one table: a rotation turns both, where the head is another matrix."""
    view = stream_of(build("t5, untied"))
    (memory,) = (junction for junction in view.junctions if not junction.writers)
    assert memory.norm == "encoder.final_layer_norm"
    assert memory.readers == tuple(f"decoder.block.0.layer.1.EncDecAttention.{part}" for part in "kv")
