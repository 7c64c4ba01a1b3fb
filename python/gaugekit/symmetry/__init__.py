"""What may be changed in a transformer without being seen: groups, counting, gauge fixing."""

from gaugekit.symmetry.action import Symmetry
from gaugekit.symmetry.gauge import GaugeFix, fix
from gaugekit.symmetry.groups import REMOVED, SYMMETRIES, count
from gaugekit.symmetry.rows import coordinates, max_volume, shared_partition

__all__ = [
    "REMOVED",
    "SYMMETRIES",
    "GaugeFix",
    "Symmetry",
    "coordinates",
    "count",
    "fix",
    "max_volume",
    "shared_partition",
]
