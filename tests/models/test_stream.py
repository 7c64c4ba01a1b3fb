"""The view of a residual stream: its modules are the model's own, and run as the view says they do."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gaugekit.models import FAMILIES, Live, family  # noqa: E402
from sliceable import FAMILIES as SLICEABLE  # noqa: E402
from sliceable import build, exact, ids  # noqa: E402
from stream_rows import MODELS, Offset  # noqa: E402
from stream_rows import build as build_row  # noqa: E402

KINDS = {SLICEABLE[name][0].lower() for name in SLICEABLE}


def run(model, names):
    """One forward: the names in the order their modules ran, and {name: (first input, output)}."""
    order, values = [], {}

    def hook(name):
        def note(module, arguments, output):
            order.append(name)
            values[name] = (arguments[0], output)

        return note

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    with torch.no_grad():
        model(input_ids=ids())
    return order, values


@pytest.mark.parametrize("name", list(SLICEABLE))
def test_each_junction_reads_the_stream_through_its_norm_and_adds_to_it(name):
    model = exact(build(name))
    adapter = family(model.config.to_dict())
    stream, prefix = adapter.stream(), adapter.prefix(path for path, _ in model.named_parameters())
    junctions = [junction for junctions in stream.junctions for junction in junctions]
    assert len(stream.junctions) == adapter.layers == 2 and stream.places == len(junctions)
    ends = [prefix + path for path in (stream.tokens, stream.positions, stream.norm) if path] + [stream.head]
    inner = [prefix + path for j in junctions for path in (j.norm, *j.readers, *j.writers)]
    order, values = run(model, [*ends, *inner])

    def entering(path):
        return values[prefix + path][0]

    def leaving(path):
        return values[prefix + path][1].reshape(-1, ids().shape[1], stream.size)

    x = leaving(stream.tokens)
    if stream.positions is not None:
        x = x + leaving(stream.positions)
    for junction in junctions:
        torch.testing.assert_close(entering(junction.norm).view_as(x), x, rtol=1e-12, atol=1e-12)
        for reader in junction.readers:
            assert torch.equal(entering(reader).view_as(x), leaving(junction.norm))
        x = x + sum(leaving(writer) for writer in junction.writers)
        ran = [order.index(prefix + path) for path in (junction.norm, *junction.readers, *junction.writers)]
        assert min(ran) == ran[0] and max(ran) == ran[-1]
    torch.testing.assert_close(entering(stream.norm).view_as(x), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(values[stream.head][0], leaving(stream.norm)) and order[-1] == stream.head
    assert x.shape[-1] == stream.size


@pytest.mark.parametrize("name", list(SLICEABLE))
def test_what_a_view_says_of_norms_and_ends_is_so(name):
    model = build(name)
    adapter = family(model.config.to_dict())
    stream, prefix = adapter.stream(), adapter.prefix(path for path, _ in model.named_parameters())
    norms = [stream.norm] + [junction.norm for junctions in stream.junctions for junction in junctions]
    for norm in (model.get_submodule(prefix + path) for path in norms):
        assert isinstance(norm, torch.nn.LayerNorm) is stream.centred
        assert stream.eps == (norm.eps if stream.centred else norm.variance_epsilon)
    table, head = model.get_submodule(prefix + stream.tokens), model.get_submodule(stream.head)
    assert (head.weight is table.weight) is stream.tied
    assert model.get_input_embeddings() is table and model.get_output_embeddings() is head
    for junction in (junction for junctions in stream.junctions for junction in junctions):
        for path in (*junction.readers, *junction.writers):
            module = model.get_submodule(prefix + path)
            assert isinstance(module, torch.nn.Linear) is not stream.transposed
    assert all(entry in model.config.to_dict() for entry in stream.dropouts)


# What has streams that groups act on, though none that slicing cuts
TURNED = {
    "t5", "mt5", "umt5", "whisper", "vit", "deit", "dinov2", "dinov2_with_registers", "clip", "clip_text_model",
    "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model", "gemma", "gemma2", "gemma3_text",
    "olmo2", "olmo3", "mbart", "pegasus", "blenderbot", "m2m_100",
}  # fmt: skip
POST_NORM = {"bart", "marian", "blenderbot-small", "plbart"}


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - KINDS))
def test_a_family_whose_stream_is_not_sliced_says_why(kind):
    """Norms behind the parts, images, two stacks; of experts and others nobody has said how their stream turns."""
    adapter = family(transformers.AutoConfig.for_model(kind).to_dict())
    reason = (
        "model: .*cannot be sliced: "
        if kind in TURNED | POST_NORM
        else f"model_type: .* '{kind}' models has no view yet"
    )
    with pytest.raises(ValueError, match=reason):
        adapter.stream()
    if kind in TURNED:
        assert len(adapter.streams()) == (2 if kind in ("whisper", "clip", "siglip") else 1)
        return
    reason = (
        "put their norms on the stream itself" if kind in POST_NORM else "has no view yet|cannot be sliced"
    )
    with pytest.raises(ValueError, match=reason):
        adapter.streams()


@pytest.mark.parametrize("name", MODELS)
def test_what_a_view_of_another_family_says_of_its_norms_is_so(name):
    model = build_row(name)
    live = Live(model)
    for stream in live.family.streams():
        junctions = [junction for junctions in stream.junctions for junction in junctions]
        norms = {*stream.entries, stream.norm, *(n for j in junctions for n in (j.norm, j.after))} - {None}
        for norm in (model.get_submodule(live.prefix + path) for path in norms):
            assert isinstance(norm, torch.nn.LayerNorm) is stream.centred
            assert stream.eps == norm.eps
            assert stream.offset == (1.0 if isinstance(norm, Offset) else 0.0)


def test_a_backbone_that_shows_its_stream_has_no_view():
    config = transformers.Dinov2Config(apply_layernorm=False).to_dict()
    with pytest.raises(ValueError, match="apply_layernorm: expected true, got false"):
        family(config).streams()
