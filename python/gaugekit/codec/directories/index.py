"""Index files of sharded weights (``*.safetensors.index.json``): what one promises must be there."""

from __future__ import annotations

import json
from pathlib import Path

from gaugekit.codec.files import container
from gaugekit.codec.files.container import naming
from gaugekit.codec.files.header import SUFFIX

INDEX_SUFFIX = SUFFIX + ".index.json"


def weight_map(text: bytes) -> dict[str, str] | None:
    """{tensor: file} of an index file's text; None where it is no index of shards."""
    try:
        where = json.loads(text)["weight_map"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        return None
    return where


def check_indices(folder: Path, files: list[str]) -> None:
    """ValueError where an index among ``files`` (names relative to ``folder``) names a shard that is not there, or a
    tensor that its shard does not hold; CorruptFile for a shard that is damaged.
    """
    for name in files:
        if name.endswith(INDEX_SUFFIX):
            _check(folder / name)


def _check(index: Path) -> None:
    shards: dict[str, set[str]] = {}
    for tensor, file in (weight_map(index.read_bytes()) or {}).items():
        shards.setdefault(file, set()).add(tensor)
    for file, tensors in shards.items():
        path = index.parent / file
        if ".." in Path(file).parts or Path(file).is_absolute() or not path.is_file():
            raise ValueError(f"source: {str(index)!r} names the shard {file!r}, which is not there")
        if not file.endswith(SUFFIX):
            continue
        with path.open("rb") as opened, naming(path):
            absent = tensors - container.names(opened)
        if absent:
            raise ValueError(
                f"source: {str(index)!r} promises the tensor {min(absent)!r} in {file!r}, which does not hold it"
            )
