"""One adapter a family: how BERT, GPT-2, ... name and store the parts of their attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from gaugekit.models.decoders import cohere, gemma, gpt2, gpt_neo, gptj, llama, opt, phi, smollm3, stablelm
from gaugekit.models.decoders.fused import bloom, falcon, gpt_bigcode, gpt_neox, mpt, phi3
from gaugekit.models.encoder_decoders import bart, t5
from gaugekit.models.encoders import albert, bert, clip, distilbert, modernbert, vit
from gaugekit.models.family import Family, Read
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.stream_view import StreamView
from gaugekit.models.view import (
    AttentionView,
    Compact,
    Norms,
    Projection,
    Stored,
    left_alone,
    parameters,
    rounded,
    used_channels,
)

ADAPTERS: tuple[type[Family], ...] = (
    bert.Bert,
    distilbert.DistilBert,
    albert.Albert,
    modernbert.ModernBert,
    gpt2.Gpt2,
    llama.Llama,
    gemma.Gemma,
    smollm3.SmolLm3,
    cohere.Cohere,
    opt.Opt,
    phi.Phi,
    stablelm.StableLm,
    gptj.GptJ,
    gpt_neo.GptNeo,
    gpt_neox.GptNeoX,
    phi3.Phi3,
    bloom.Bloom,
    mpt.Mpt,
    falcon.Falcon,
    gpt_bigcode.GptBigCode,
    bart.Bart,
    t5.T5,
    vit.Vit,
    clip.Tower,
    clip.Clip,
)
FAMILIES: dict[str, type[Family]] = {name: adapter for adapter in ADAPTERS for name in adapter.names}
FUSED = "its fused projection of queries, keys and values has no adapter yet"
REFUSED = {
    "deberta": FUSED,
    "gemma3": "its language model has an adapter only by itself (gemma3_text)",
}


def family(config: dict) -> Family:
    """The adapter for ``config`` (the content of ``config.json``), bound to it.

    Raises ValueError for a family that is not known (naming those that are) and for a config of a known family that the
    mathematics does not cover (naming the entry or the reason).
    """
    kind = config.get("model_type")
    if kind in REFUSED:
        raise ValueError(f"model_type: {kind!r} is not covered: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(sorted(FAMILIES))}; got {kind!r}")
    adapter = FAMILIES[kind](config)
    try:
        adapter.check()
        layers = range(adapter.layers)
        for layer in {*layers[:1], *layers[-1:]}:
            adapter.outline(layer)
    except KeyError as missing:
        raise ValueError(f"config of a {kind} model: expected an entry {missing}, got none") from None
    except (TypeError, AttributeError, ArithmeticError, RuntimeError) as odd:
        raise ValueError(f"config of a {kind} model: an entry is of an odd type or size: {odd}") from odd
    return adapter


def unused_positions(config: dict) -> int:
    """How many of a model's first position embeddings no token has: RoBERTa and its kin begin after the padding's."""
    return (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in bert.OFFSET else 0


def two_towers(config: dict) -> bool:
    """Whether a model has a tower for text and one for images beside each other, and reads both at once."""
    return config.get("model_type") in clip.Clip.names


class Layers:
    """The attention of a model, layer by layer, from anything that reads tensors by name.

    ``config`` is the content of ``config.json``, ``names`` the names of all tensors, ``read(name)`` gives one. For a
    checkpoint: ``Layers(checkpoint.config, checkpoint.names(), checkpoint.read)``. Attributes: ``family``, ``config``
    (as the family has it: of an encoder without its decoder it says so), ``prefix`` (what stands before the base
    model's names: "", "bert.", ...). Raises ValueError for a family that is not known, a model that is not found among
    the names, or one that was sliced.
    """

    def __init__(self, config: dict, names: Iterable[str], read: Read):
        if (config.get("quantization_config") or {}).get("sliced"):
            raise ValueError(
                "model: expected a plain one, got one whose residual stream was sliced; use the original"
            )
        names = list(names)
        self.family = family(config).named(names)
        self.config = self.family.config
        self.prefix = self.family.prefix(names)
        self._read = read

    def __len__(self) -> int:
        """L, the number of attentions with weights of their own."""
        return self.family.layers

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` of the base model (without prefix)."""
        return self._read(self.prefix + name)

    def attention(self, layer: int) -> AttentionView:
        """The float64 view of one layer's attention; its projections know the dtypes they are stored in."""
        stored: dict[str, torch.dtype] = {}

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            stored[name] = tensor.dtype
            return tensor

        view = self.family.attention(layer, read)
        paths = self.family.projections(layer)
        parts = {
            part: replace(getattr(view, part), dtype=stored[f"{path}.weight"]) for part, path in paths.items()
        }
        view = replace(view, **parts, layer=layer)
        return view if view.q.weight.is_meta else replace(view, channels=used_channels(view))


class Live(Layers):
    """The layers of a live model: an nn.Module with a ``config`` (transformers' models have one).

    Raises ValueError where it has none, or where its family is not known.
    """

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict"):
            raise ValueError(
                f"model: expected a transformers model (with a config), got {type(model).__name__}"
            )
        self.model = model
        super().__init__(config.to_dict(), (name for name, _ in model.named_parameters()), self._parameter)

    def _parameter(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        # A compact module has a dense weight too, which it makes: nothing could be written into that.
        tensor = self.model.get_submodule(module)._parameters.get(leaf)
        if tensor is None:
            raise ValueError(
                f"model: expected a dense parameter {name}, got none (already compact, or in an adapter?)"
            )
        if tensor.is_meta:
            raise ValueError(f"model: expected numbers in {name}, got none (meta device)")
        if hasattr(tensor, "placements"):  # a DTensor, without the import of its module
            raise ValueError(f"model: expected the whole of {name}, got one that is cut among ranks")
        return tensor.detach().cpu()

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Copies ``tensors``, one layer's, into the parameters of those names (without prefix), rounded to their dtype.

        Raises ValueError, before anything is written, for a parameter that is another's too, since both would change:
        of two parts of the layer, or of another layer, unless that has all of them; and for numbers that are too large
        for its dtype.
        """
        parameters = {name: self.model.get_parameter(self.prefix + name) for name in tensors}
        shared = {
            self.prefix + name: self._shared[_place(parameter)] for name, parameter in parameters.items()
        }
        whole = len({len(names) for names in shared.values()}) == 1
        for name, names in shared.items():
            if len(names) > 1 and not (whole and shared.keys() & names == {name}):
                others = ", ".join(sorted(names - {name}))
                raise ValueError(f"model: expected {name!r} to share its numbers with no other, got {others}")
        results = {name: rounded(name, tensor, parameters[name].dtype) for name, tensor in tensors.items()}
        for name, result in results.items():
            parameters[name].data.copy_(result)

    @cached_property
    def _shared(self) -> dict[int, set[str]]:
        """{place: names of the parameters that stand there}."""
        shared: dict[int, set[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            shared.setdefault(_place(parameter), set()).add(name)
        return shared


def _place(parameter: Tensor) -> int:
    """The address of a parameter's numbers; of one that has none (packed, empty), its own."""
    plain = type(parameter) is nn.Parameter and parameter.numel() > 0 and not parameter.is_meta
    return parameter.data_ptr() if plain else id(parameter)


__all__ = [
    "FAMILIES",
    "AttentionView",
    "Compact",
    "Family",
    "Junction",
    "Layers",
    "Live",
    "Mlp",
    "Norms",
    "Projection",
    "Stored",
    "Stream",
    "StreamView",
    "family",
    "left_alone",
    "parameters",
    "rounded",
    "two_towers",
    "unused_positions",
    "used_channels",
]
