"""Models whose rotations are hidden in their own bits: groups of matrices in, a payload out, and back bit for bit."""

from gaugekit.codec.bitsback.coding import decode, encode
from gaugekit.codec.bitsback.model import Coupling, Group, GroupReport, ModelReport, Part, permutation_bits

__all__ = ["Coupling", "Group", "GroupReport", "ModelReport", "Part", "decode", "encode", "permutation_bits"]
