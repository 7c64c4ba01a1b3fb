"""What a model carries that nobody can observe, from its config alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaugekit import symmetry
from gaugekit.checkpoint.config import CONFIG, check_config, read_config, stored_as
from gaugekit.files.missing import how_to_convert
from gaugekit.models import FAMILIES, AttentionView, Layers, Live, Stream, StreamView, family, left_alone
from gaugekit.models.stream_view import stands, views
from gaugekit.report import Report
from gaugekit.verbs import wording

GROUPS = (*symmetry.SYMMETRIES, *symmetry.STREAM_SYMMETRIES)

HEADED = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "DoubleHeadsModel")  # classes with logits
HEADLESS = (
    "Model",
    "Classification",
    "WithTeacher",
    "Answering",
    "Choice",
    "Modeling",
    "Backbone",
    "WithProjection",
)

TIED = (
    "stream_rotation: none, since the head shares the table of embeddings and the gain of the last norm stands between "
    "the two (where all channels have gains of their own, as trained models do)"
)


def config_of(model: Any) -> dict | None:
    """The config ``model`` stands for, if it has no weights: a dict, a .json file, or a directory without safetensors.

    None for everything else.
    """
    if isinstance(model, Mapping):
        return check_config(dict(model))
    if isinstance(model, nn.Module):
        return None
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return read_config(path.parent, path.name)
    if not (path / CONFIG).is_file() or any(path.glob("*.safetensors*")) or how_to_convert(path):
        return None
    return read_config(path)


def inspect_config(config: dict, model: Any, text: Any = None) -> Report:
    """``inspect`` of a config, which reads no ``text``: ``parameters``, ``unobservable``, ``removable`` and
    ``permutation_bits`` as there, all that is read off weights None, and no ``layers``. ``model`` is what errors and
    the report call it.
    """
    from gaugekit.hf import loading

    if text is not None:
        raise ValueError("text: expected none beside a config without weights, got some")
    named = "this config" if isinstance(model, Mapping) else str(model)
    refuse_stored(config)
    if config.get("model_type") not in FAMILIES:
        family(
            config
        )  # says so, and which there are; of the others, transformers fills in what the config leaves out
    live = loading.shapes(config, named)
    tensors = {
        name: parameter for name, parameter in live.named_parameters() if parameter.is_floating_point()
    }
    if config.get("tie_word_embeddings") is False:
        tensors |= _own_head(live)
    layers = Layers(live.config.to_dict() | config, tensors, tensors.__getitem__)
    views = [layers.attention(layer) for layer in range(len(layers))]
    counted, notes = [outline(view) for view in views], []
    streams = _streams(layers, tensors, live, notes)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    fields = {
        "parameters": parameters,
        **hidden(counted, streams),
        "exponent_entropy_bits": None,
        "token_cosine": None,
        "layers": [],
    }
    notes += left_alone([view.barred for view in views])
    if any(stream.head == "tied" for stream in streams):
        notes.append(TIED)
    notes.insert(0, meaning(fields, counted))
    return wording.inspected(Report("inspect", fields, notes), named, 1.0)


def _own_head(live: nn.Module) -> dict[str, Tensor]:
    """The head of a model whose config unties it, where transformers ties it all the same (T5's kin) until it loads a
    file that holds both.
    """
    head = live.get_output_embeddings()
    paths = [path for path, module in live.named_modules() if module is head and head is not None]
    return {f"{path}.weight": head.weight for path in paths}


def refuse_stored(config: Mapping[str, Any]) -> None:
    """ValueError for the config of weights that are not plain: what they store does not follow from its sizes."""
    if (method := stored_as(config)) is not None:
        raise ValueError(f"model: expected plain weights, got ones stored as {method!r}; use the original")


def values_tied(config: Mapping[str, Any]) -> list[str]:
    """What to say of a model with NeuTRENO: each layer sees the first one's values, so that no layer's are its own."""
    lam = (config.get("quantization_config") or {}).get("neutreno")
    if not (any(lam) if isinstance(lam, list) else lam):
        return []
    return [
        "counts: of the model without NeuTRENO, which shows each layer the first one's values, so that value_output is "
        "free in all layers together only"
    ]


@dataclass(frozen=True)
class Counted:
    """What a report keeps of a layer's view, which is large: the dimensions of its groups, and what its heads are."""

    dimensions: dict[str, int]
    groups: int
    repeats: int
    rotary: int
    alike: bool  # whether heads may change places: slopes of ALiBi tell them apart
    shared_bias: str | None = None  # as in the view: with which layers they do


def outline(view: AttentionView) -> Counted:
    """What is counted in one layer."""
    return Counted(
        symmetry.count(view), view.groups, view.repeats, view.rotary, view.slopes is None, view.shared_bias
    )


def hidden(layers: list[Counted], streams: Sequence[StreamView]) -> dict[str, Any]:
    """The counts of a report: ``unobservable`` {group: numbers, total}, ``removable``, ``permutation_bits``."""
    unobservable = dict.fromkeys(GROUPS, 0)
    for layer in layers:
        for group, dimension in layer.dimensions.items():
            unobservable[group] += dimension
    for stream in streams:
        for group, dimension in symmetry.count_stream(stream).items():
            unobservable[group] += dimension
    removable = sum(unobservable[group] for group in symmetry.REMOVED)
    total = sum(unobservable.values())
    heads = {
        layer.shared_bias or index: (layer.groups, layer.repeats)
        for index, layer in enumerate(layers)
        if layer.alike
    }
    return {
        "unobservable": {**unobservable, "total": total},
        "removable": removable,
        "permutation_bits": symmetry.permutation_bits(heads.values(), streams),
    }


def streams_of(
    layers: Layers, sizes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor], notes: list[str]
) -> list[StreamView]:
    """The streams of a model with tensors of these ``sizes``; none, with a note, where its family has no view of them,
    or tensors of them are missing.

    Only tensors with one axis are ``read``, gains and biases, which are few, and a head beside a table that should be
    its own.
    """
    tensors = {
        name: read(name) if len(size) == 1 else torch.empty(size, device="meta")
        for name, size in sizes.items()
    }
    if isinstance(layers, Live):
        return _streams(layers, tensors, layers.model, notes)
    return _streams(layers, tensors, None, notes, lambda a, b: torch.equal(read(a), read(b)))


def _streams(
    layers: Layers, tensors: Mapping[str, Tensor], live: nn.Module | None, notes: list[str],
    same: Callable[[str, str], bool] = lambda a, b: False,
) -> list[StreamView]:  # fmt: skip
    of_file = _headed(layers.config)
    modules = {name for name, _ in live.named_modules()} if live is not None else set()

    def headed(stream: Stream) -> bool:
        return (
            stands(stream, modules) if live is not None else StreamView.has_head(stream, tensors) or of_file
        )

    counted = []
    try:
        for view in views(layers.family, layers.prefix, tensors, headed, same):
            counted.append(view)
    except ValueError as odd:
        reason = str(odd).removeprefix("model_type: ").removeprefix("model: ")
        notes.append(f"norms, stream and MLPs: not {'all ' if counted else ''}counted, since {reason}")
    notes += [f"stream_rotation: {_turns(view)}, since {view.still}" for view in counted if _explains(view)]
    if stranger := next((view.stranger for view in counted if view.stranger), None):
        notes.append(
            f"norms, stream: what reads the last norm is not counted, since {stranger!r} has no view here"
        )
    return counted


def _headed(config: Mapping[str, Any]) -> bool:
    """Whether a model has logits by the class that its config names; also one of code of its own, which may have."""
    names = config.get("architectures") or ()
    return any(name.endswith(HEADED) or not name.endswith(HEADLESS) for name in names)


def _turns(view: StreamView) -> str:
    return "not of all channels" if symmetry.STREAM_SYMMETRIES["stream_rotation"].dimension(view) else "none"


def _explains(view: StreamView) -> bool:
    """Whether a note has to say why a stream does not turn: that of ties, and of a bare model's, says so elsewhere."""
    return view.still is not None and view.head in ("own", "inner")


def meaning(fields: dict[str, Any], layers: list[Counted]) -> str:
    """One sentence of what the counts come to."""
    total, removable, parameters = fields["unobservable"]["total"], fields["removable"], fields["parameters"]
    share = f"{total:,} of {parameters:,} parameters ({100 * total / parameters:.2f} %) cannot be observed"
    if any(layer.rotary and layer.repeats > 1 for layer in layers):
        few = "with shared key/value heads and rotary positions little can go (under 0.4 % in Llama models)"
        return f"{share}: {few}"
    return f"{share}: gauge fixing removes {removable:,} of them, and no output changes"
