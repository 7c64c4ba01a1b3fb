"""Slicing: the residual stream cut to its principal directions, its rotations in the cheapest of their exact forms."""

from gaugekit.slicing.run import slice, sliced_width

__all__ = ["slice", "sliced_width"]
