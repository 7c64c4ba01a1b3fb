"""What may be changed in a transformer without being seen: groups, counting, gauge fixing."""

from gaugekit.symmetry.gauge import GaugeFix, count, fix
from gaugekit.symmetry.groups import SYMMETRIES, Symmetry
from gaugekit.symmetry.rows import coordinates, max_volume, shared_partition

__all__ = [
    "SYMMETRIES",
    "GaugeFix",
    "Symmetry",
    "coordinates",
    "count",
    "fix",
    "max_volume",
    "shared_partition",
]
