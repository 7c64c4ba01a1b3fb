"""What may be changed in a transformer without being seen: groups, counting, gauge fixing."""

from gaugekit.symmetry.action import Symmetry
from gaugekit.symmetry.gauge import GaugeFix, QuantizationGauge, fix
from gaugekit.symmetry.groups import (
    REMOVED,
    STREAM_SYMMETRIES,
    SYMMETRIES,
    count,
    count_stream,
    permutation_bits,
)
from gaugekit.symmetry.rows import balanced, coordinates, max_volume, shared_partition
from gaugekit.symmetry.skipless import JointBasis, absorb
from gaugekit.symmetry.stream import StreamSymmetry, put_stream, stream_of, streams_of

__all__ = [
    "REMOVED",
    "STREAM_SYMMETRIES",
    "SYMMETRIES",
    "GaugeFix",
    "JointBasis",
    "QuantizationGauge",
    "StreamSymmetry",
    "Symmetry",
    "absorb",
    "balanced",
    "coordinates",
    "count",
    "count_stream",
    "fix",
    "max_volume",
    "permutation_bits",
    "put_stream",
    "shared_partition",
    "stream_of",
    "streams_of",
]
