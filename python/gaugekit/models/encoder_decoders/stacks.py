"""What encoder-decoder models have in common: three kinds of attention, each a stack of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from gaugekit.models.compound import Compound, Place
from gaugekit.models.family import Family
from gaugekit.models.linears import Linears
from gaugekit.models.stream import Junction

COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)  # of the shared table, as files may hold it
UNSLICED = (
    "model: its streams cannot be sliced: a calibration runs one text through the decoder of a language model, and "
    "this model is an encoder, or has one"
)


class Stack(Linears):
    """One kind of attention in all blocks that have it: "encoder", "decoder" (self-attention) or "cross".

    Cross-attention stands in the decoder's blocks; its queries read the decoder's stream, its keys and values what the
    encoder gives.
    """

    def __init__(self, config: dict, kind: str):
        super().__init__(config)
        self.kind = kind

    @property
    def side(self) -> str:
        """Whose blocks it stands in: "encoder" or "decoder"."""
        return "encoder" if self.kind == "encoder" else "decoder"

    @property
    def size(self) -> int:
        return self.config["d_model"]

    @abstractmethod
    def junctions(self, layer: int) -> tuple[Junction, ...]:
        """Those of a layer, where its norms stand before its parts; the MLP is the last attention's of a block."""


class EncoderDecoder(Compound):
    """The encoder's layers, then of each block of the decoder its self-attention and its cross-attention.

    A family says ``stack``, the class of its kinds of attention, and ``names`` and ``anchor``, a tensor of the
    encoder's. Of an encoder alone the config it goes by has ``is_encoder_decoder`` false, whatever the file says.
    """

    stack: type[Stack]
    unsliced = UNSLICED

    @property
    def divided(self) -> str | None:
        return "its encoder and its decoder read sequences of their own" if self.decodes else None

    @property
    def decodes(self) -> bool:
        """Whether there is a decoder beside the encoder."""
        return bool(self.config.get("is_encoder_decoder", True))

    def named(self, names: Iterable[str]) -> Family:
        first = f"{self.stack(self.config, 'cross').projections(0)['o']}.weight"
        decodes = any(name.endswith(first) for name in names)
        if decodes == self.decodes:
            return self
        return type(self)({**self.config, "is_encoder_decoder": decodes})

    def places(self) -> list[Place]:
        encoder, decoder, cross = (self.stack(self.config, kind) for kind in ("encoder", "decoder", "cross"))
        places = [Place("", encoder, layer) for layer in range(encoder.layers)]
        for layer in range(decoder.layers if self.decodes else 0):
            places += [Place("", decoder, layer), Place("", cross, layer)]
        return places

    def junctions(self, *kinds: str) -> tuple[tuple[Junction, ...], ...]:
        """Those of each layer of these kinds."""
        return tuple(place.part.junctions(place.layer) for place in self.places() if place.part.kind in kinds)

    def memory(self, norm: str) -> tuple[Junction, ...]:
        """Where the decoder's keys and values read what the encoder's last ``norm`` gives."""
        crossed = [place for place in self.places() if place.part.kind == "cross"]
        read = [(place.part, place.part.projections(place.layer)) for place in crossed]
        readers = tuple(paths[part] for _, paths in read for part in "kv")
        keys = tuple(paths["k"] for stack, paths in read if not stack.biased("k"))
        return (Junction(norm, readers, (), keys=keys),)
