"""All groups by name, those of an attention layer and those of a whole model, and what they come to in one."""

from __future__ import annotations

from collections.abc import Iterable

from gaugekit.codec import bitsback
from gaugekit.models import AttentionView, StreamView
from gaugekit.symmetry.action import Symmetry
from gaugekit.symmetry.attention import KeyBias, QueryKey, ValueBias, ValueOutput
from gaugekit.symmetry.folding import (
    LayerScales,
    NeuronScales,
    NormBiases,
    NormGains,
    StreamMeans,
    StreamOffsets,
)
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
        LayerScales(),
    )
}
REMOVED = ("value_output", "query_key", "key_bias", "value_bias")  # those whose fixed form stores less


def count(view: AttentionView) -> dict[str, int]:
    """The numbers nobody can observe in one layer, by group: their sum is how many could be fixed unseen."""
    return {name: symmetry.dimension(view) for name, symmetry in SYMMETRIES.items()}


def count_stream(view: StreamView) -> dict[str, int]:
    """As ``count``, of what acts on a whole model beside its attention layers."""
    return {name: symmetry.dimension(view) for name, symmetry in STREAM_SYMMETRIES.items()}


def permutation_bits(heads: Iterable[tuple[int, int]], streams: Iterable[StreamView] = ()) -> float:
    """log₂ of how many orders the heads of every layer, and the hidden units of every MLP, could stand in.

    ``heads``: of each layer, how many key/value heads it has, and how many query heads share one; layers whose heads
    change places only together count as one (``AttentionView.shared_bias``). MLPs are those of the ``streams``.
    Permutations are finitely many: they free no number, but an order says that much which nobody can observe.
    """
    orders = [count for groups, repeats in heads for count in (groups, *[repeats] * groups)]
    for stream in streams:
        mlps = [junction.mlp for junction in stream.junctions if junction.mlp is not None]
        orders += [stream.linear(mlp.up)[0].shape[0] for mlp in mlps]
    return sum(map(bitsback.permutation_bits, orders), 0.0)
