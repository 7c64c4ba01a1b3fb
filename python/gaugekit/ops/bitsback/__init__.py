"""Rotations popped from and pushed to a coder's stack."""

from gaugekit.ops.bitsback.operator import Stack, rotate

__all__ = ["Stack", "rotate"]
