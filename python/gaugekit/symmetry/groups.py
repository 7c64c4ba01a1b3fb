"""All groups that act on the view of an attention layer, by name."""

from __future__ import annotations

from gaugekit.models import AttentionView
from gaugekit.symmetry.action import Symmetry
from gaugekit.symmetry.attention import KeyBias, QueryKey, ValueBias, ValueOutput
from gaugekit.symmetry.norms import QueryKeyGains, QueryKeyMeans, QueryKeyTurns
from gaugekit.symmetry.rotary import PlainKeyBias, PlainQueryKey, RotaryPairs

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
REMOVED = ("value_output", "query_key", "key_bias", "value_bias")  # those whose fixed form stores less


def count(view: AttentionView) -> dict[str, int]:
    """The numbers nobody can observe in one layer, by group: their sum is how many could be fixed unseen."""
    return {name: symmetry.dimension(view) for name, symmetry in SYMMETRIES.items()}
