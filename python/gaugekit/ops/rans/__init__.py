"""Exact bytes in, exact bytes out: the coder of exponent streams, the same bits from every backend."""

from gaugekit.ops.rans.operator import CorruptFile, crc32c, decode, encode, open_blob

__all__ = ["CorruptFile", "crc32c", "decode", "encode", "open_blob"]
