"""Blocks of a key/value cache, without loss in fewer bytes: tables, one block to bytes and back, a bounded store."""

from gaugekit.codec.kv.block import KVCodec
from gaugekit.codec.kv.store import KVStats, KVStore
from gaugekit.codec.kv.tables import KVTables

__all__ = ["KVCodec", "KVStats", "KVStore", "KVTables"]
