"""Lossless coding: tensors to blobs, .safetensors files to smaller ones, key/value caches in a store; bit for bit."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gaugekit.codec.files.reader import load_file, safe_open
    from gaugekit.codec.files.saving import save_file
    from gaugekit.codec.kv import KVCodec, KVStats, KVStore, KVTables
    from gaugekit.codec.packing import pack, unpack
    from gaugekit.codec.tensors.coding import decode, decode_range, encode
    from gaugekit.codec.tensors.device import DeviceDecoder
    from gaugekit.coder.blob import CorruptFile

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

# Where each stands, to be found when first asked for: ``pack`` and ``unpack`` of files need no torch.
_LAZY = {
    "CorruptFile": "gaugekit.coder.blob",
    "DeviceDecoder": "gaugekit.codec.tensors.device",
    "KVCodec": "gaugekit.codec.kv",
    "KVStats": "gaugekit.codec.kv",
    "KVStore": "gaugekit.codec.kv",
    "KVTables": "gaugekit.codec.kv",
    "decode": "gaugekit.codec.tensors.coding",
    "decode_range": "gaugekit.codec.tensors.coding",
    "encode": "gaugekit.codec.tensors.coding",
    "load_file": "gaugekit.codec.files.reader",
    "pack": "gaugekit.codec.packing",
    "safe_open": "gaugekit.codec.files.reader",
    "save_file": "gaugekit.codec.files.saving",
    "unpack": "gaugekit.codec.packing",
}
_ROOMS = ("bitsback", "directories", "files", "kv", "packing", "tensors")


if not TYPE_CHECKING:  # or a type checker would believe in every name

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return _import_module(f"gaugekit.codec.{name}")
        if name not in _LAZY:
            raise AttributeError(f"module 'gaugekit.codec' has no attribute {name!r}")
        value = getattr(_import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
