"""A checkpoint on disk, read piece by piece: a directory of config.json and safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gaugekit.checkpoint.config import CONFIG, read_config, read_json, stored_as
from gaugekit.codec import CorruptFile, safe_open
from gaugekit.codec.tensors.dtypes import DTYPES
from gaugekit.files.durable import sha256
from gaugekit.files.missing import how_to_convert, how_to_get

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A directory with ``config.json`` and ``model.safetensors``, or shards and their index; packed or not.

    Nothing is read before it is asked for; a tensor asked for is read alone (``gaugekit.codec.safe_open``). Raises
    ValueError, saying what was expected, for a directory, config or weights that are missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"checkpoint: expected a directory with config.json and safetensors, got {str(path)!r}"
                f"{how_to_get(self.path)}"
            )
        if not (self.path / CONFIG).is_file() and (hint := how_to_convert(self.path)):
            raise ValueError(f"checkpoint: expected {CONFIG} in {str(path)!r}, found none{hint}")
        self.config: dict = read_config(self.path)
        self._open: dict[str, safe_open] = {}
        self._sums: dict[str, str] = {}
        self._where = self._promised()
        self.files = sorted(set(self._where.values()))
        for file in self.files:
            self._take_stock(file)

    def names(self) -> list[str]:
        """The names of all stored tensors, sorted."""
        return sorted(self._where)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored or as it was before it was packed."""
        return self._file(self._find(name)).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file(self._find(name)).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        kind = self._file(self._find(name)).get_slice(name).get_dtype()
        return DTYPES[kind]

    def file(self, name: str) -> str:
        """The file a tensor stands in."""
        return self._find(name)

    def bytes(self, name: str) -> int:
        """The bytes a tensor takes in memory."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def size_bytes(self) -> int:
        """The bytes of all weight files."""
        return sum((self.path / file).stat().st_size for file in self.files)

    def sha256(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """The SHA-256 of every weight file and of config.json, by name, each computed once; ``progress`` is told each
        block's bytes.
        """
        for file in [*self.files, CONFIG]:
            if file not in self._sums:
                self._sums[file] = sha256(self.path / file, progress)
            elif progress:
                progress((self.path / file).stat().st_size)
        return dict(self._sums)

    def _promised(self) -> dict[str, str]:
        """{tensor: file}, by the index or by the one file there is."""
        if not (self.path / INDEX).is_file():
            file = self._single()
            return {name: file for name in self._file(file).keys()}  # noqa: SIM118
        where = _weight_map(self.path / INDEX)
        if (self.path / WEIGHTS).is_file() and WEIGHTS not in where.values():
            # Loaders take the one file, and whoever reads the index the others: they need not be the same weights.
            raise ValueError(
                f"checkpoint: expected {WEIGHTS} or shards with {INDEX} in {str(self.path)!r}, got both; "
                "remove what is not meant"
            )
        return where

    def _take_stock(self, file: str) -> None:
        """Compares a file's tensors with the index. One that the index does not name is the model's all the same:
        loaders read shards whole.
        """
        stored = self._file(file).keys()
        absent = sorted(
            name for name, where in self._where.items() if where == file and name not in set(stored)
        )
        if absent:
            raise ValueError(f"checkpoint: {INDEX} promises {absent[0]!r} in {file}, which does not hold it")
        for name in stored:
            if self._where.setdefault(name, file) != file:
                raise ValueError(
                    f"checkpoint: expected {name!r} in one file, got it in {self._where[name]} and in {file}"
                )

    def _single(self) -> str:
        if (self.path / WEIGHTS).is_file():
            return WEIGHTS
        others = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        hint = " (several .safetensors files but no index)" if others else ""
        if not others:
            hint = how_to_convert(self.path)
        raise ValueError(
            f"checkpoint: expected {WEIGHTS} or {INDEX} in {str(self.path)!r}, got neither{hint}"
        )

    def _file(self, file: str) -> safe_open:
        if file not in self._open:
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"checkpoint: expected the file {file} in {str(self.path)!r}, got none")
            try:
                self._open[file] = safe_open(path)
            except (CorruptFile, OSError) as error:
                raise ValueError(f"checkpoint: {file} is no intact safetensors file: {error}") from error
        return self._open[file]

    def _find(self, name: str) -> str:
        if name not in self._where:
            compact = " (its attention is already in compact form)" if stored_as(self.config) else ""
            raise ValueError(f"checkpoint: expected a tensor named {name!r}, got none{compact}")
        return self._where[name]


def _weight_map(path: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"checkpoint: expected a weight_map of tensor names to files in {path.name}")
    for file in set(where.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"checkpoint: {path.name} names {file!r}; expected a .safetensors file of the directory"
            )
    return where
