"""What may be changed in a transformer without being seen: groups, counting, gauge fixing."""

from .gauge import GaugeFix, compact, count, fix
from .groups import SYMMETRIES, Symmetry
from .rows import coordinates, max_volume, shared_partition

__all__ = [
    "SYMMETRIES",
    "GaugeFix",
    "Symmetry",
    "compact",
    "coordinates",
    "count",
    "fix",
    "max_volume",
    "shared_partition",
]
