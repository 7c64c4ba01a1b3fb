"""Lossless coding of weights: tensors to blobs, .safetensors files to smaller ones, and back bit for bit."""

from ..ops.rans import CorruptFile
from .device import DeviceDecoder
from .files import pack, unpack
from .reader import load_file, safe_open
from .saving import save_file
from .tensors import decode, decode_range, encode

__all__ = [
    "CorruptFile",
    "DeviceDecoder",
    "decode",
    "decode_range",
    "encode",
    "load_file",
    "pack",
    "safe_open",
    "save_file",
    "unpack",
]
