"""Rotations popped from and pushed to a coder's stack."""

from gaugekit.ops.bitsback.operator import CorruptStack, Stack, rotate

__all__ = ["CorruptStack", "Stack", "rotate"]
