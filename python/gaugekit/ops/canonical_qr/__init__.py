"""QR with a positive diagonal, the same bits on every machine."""

from gaugekit.ops.canonical_qr.operator import canonical_qr

__all__ = ["canonical_qr"]
