"""All groups by name, those of an attention layer and those of a whole model, and what they come to in one."""

from __future__ import annotations

from gaugekit.models import AttentionView
from gaugekit.symmetry.action import Symmetry
from gaugekit.symmetry.attention import KeyBias, QueryKey, ValueBias, ValueOutput
from gaugekit.symmetry.folding import NeuronScales, NormBiases, NormGains, StreamMeans, StreamOffsets
from gaugekit.symmetry.norms import QueryKeyGains, QueryKeyMeans, QueryKeyTurns
from gaugekit.symmetry.rotary import PlainKeyBias, PlainQueryKey, RotaryPairs
from gaugekit.symmetry.rotation import StreamRotation
from gaugekit.symmetry.stream import StreamSymmetry

SYMMETRIES: dict[str, Symmetry] = {
    symmetry.name: symmetry
    for symmetry in (
        ValueOutput(),
        QueryKey(),
        KeyBias(),
        ValueBias(),
        RotaryPairs(),
        PlainQueryKey(),
        PlainKeyBias(),
        QueryKeyGains(),
        QueryKeyTurns(),
        QueryKeyMeans(),
    )
}
STREAM_SYMMETRIES: dict[str, StreamSymmetry] = {
    symmetry.name: symmetry
    for symmetry in (
        NormGains(),
        NormBiases(),
        StreamMeans(),
        StreamOffsets(),
        StreamRotation(),
        NeuronScales(),
    )
}
REMOVED = ("value_output", "query_key", "key_bias", "value_bias")  # those whose fixed form stores less


def count(view: AttentionView) -> dict[str, int]:
    """The numbers nobody can observe in one layer, by group: their sum is how many could be fixed unseen."""
    return {name: symmetry.dimension(view) for name, symmetry in SYMMETRIES.items()}
