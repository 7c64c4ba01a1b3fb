"""Lossless coding of weights: tensors to blobs, .safetensors files to smaller ones, and back bit for bit."""

from ..ops.rans import CorruptFile
from .blob import decode, decode_range, encode
from .files import pack, unpack

__all__ = ["CorruptFile", "decode", "decode_range", "encode", "pack", "unpack"]
