"""Lossless coding: tensors to blobs, .safetensors files to smaller ones, key/value caches in a store; bit for bit."""

from gaugekit.codec.files.reader import load_file, safe_open
from gaugekit.codec.files.saving import save_file
from gaugekit.codec.kv import KVCodec, KVStats, KVStore, KVTables
from gaugekit.codec.packing import pack, unpack
from gaugekit.codec.tensors.coding import decode, decode_range, encode
from gaugekit.codec.tensors.device import DeviceDecoder
from gaugekit.ops.rans.operator import CorruptFile

__all__ = [
    "CorruptFile",
    "DeviceDecoder",
    "KVCodec",
    "KVStats",
    "KVStore",
    "KVTables",
    "decode",
    "decode_range",
    "encode",
    "load_file",
    "pack",
    "safe_open",
    "save_file",
    "unpack",
]
