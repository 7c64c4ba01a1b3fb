"""A checkpoint on disk, read and written piece by piece: a directory of config.json and safetensors files."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaugekit.checkpoint.config import CONFIG, read_config, read_json, stored_as
from gaugekit.codec import CorruptFile, safe_open
from gaugekit.codec.files import container
from gaugekit.files.missing import how_to_convert, how_to_get
from gaugekit.files.staging import OWN, Staging, copy, dump, sha256, sync, write

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CERTIFICATE = "gaugekit_certificate.json"
SCRATCH = "gaugekit_scratch"


def safetensors_package() -> Any:
    """The safetensors package; ImportError naming the extra that brings it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("writing a checkpoint needs safetensors: pip install gaugekit[hf]") from error
    return safetensors


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
        return container.DTYPES[kind]

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


class Writer:
    """Writes a checkpoint piece by piece into ``folder`` of a place of work, so that a kill loses little.

    Tensors go into shards of about ``shard_bytes``; the manifest of ``staged`` says how many units are ``done``, which
    ``shards`` hold them, and whether the whole was ``written``. A new Writer goes on from there. ``finish`` names the
    shards and writes what stands beside them, index and config last. Every file is flushed to the disk before the
    manifest speaks of it.
    """

    def __init__(self, staged: Staging, folder: Path, *, shard_bytes: int = 10**9):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._staged = staged
        self._tensors: dict[str, Tensor] = {}
        self._waiting: list[dict] = []
        if not self._state["written"]:
            folder.mkdir(parents=True, exist_ok=True)
            self._clear({*OWN, SCRATCH, *(shard["file"] for shard in self._state["shards"])})

    @staticmethod
    def start() -> dict[str, Any]:
        """What the manifest of a new place of work says for a Writer."""
        return {"done": 0, "shards": [], "records": [], "written": False}

    @staticmethod
    def sound(folder: Path, state: dict) -> bool:
        """Whether every shard the manifest names is in ``folder``; those of an unfinished whole that were already given
        their final name get the first back.
        """
        for shard, final in zip(state["shards"], _final_names(state["shards"]), strict=True):
            if state["written"]:
                if not (folder / final).is_file():
                    return False
            elif not (folder / shard["file"]).is_file() and (folder / final).is_file():
                os.replace(folder / final, folder / shard["file"])
        return state["written"] or all((folder / shard["file"]).is_file() for shard in state["shards"])

    @property
    def done(self) -> int:
        """The units that are safe on disk."""
        return self._state["done"]

    @property
    def records(self) -> list[dict]:
        """What ``add`` was told of every unit so far."""
        return [*self._state["records"], *self._waiting]

    @property
    def _state(self) -> dict:
        return self._staged.state

    def add(self, tensors: dict[str, Tensor], record: dict) -> None:
        """The next unit: its tensors, and what to remember of it (JSON)."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if (
            self._tensors
            and sum(tensor.nbytes for tensor in self._tensors.values()) + size > self.shard_bytes
        ):
            self._flush()
        self._tensors |= tensors
        self._waiting.append(record)

    def finish(
        self,
        config: dict,
        certificate: Callable[[dict[str, str]], dict],
        copies: dict[str, Path],
        pages: Callable[[dict], dict[str, str]] = lambda certificate: {},
    ) -> None:
        """Writes the rest and names the shards; nothing where that was done before.

        ``certificate`` is given the SHA-256 of every shard, ``pages`` the certificate: {file name: text} to add. A page
        never takes the place of a file of ``copies``: it is called ``gaugekit_<name>`` there.
        """
        if self._state["written"]:
            return
        self._flush()
        shards = self._state["shards"]
        names = _final_names(shards)
        for name, source in copies.items():
            copy(source, self.folder / name)
        for shard, name in zip(shards, names, strict=True):
            os.replace(self.folder / shard["file"], self.folder / name)
        sums = {name: shard["sha256"] for shard, name in zip(shards, names, strict=True)}
        proof = certificate(sums)
        write(self.folder / CERTIFICATE, dump(proof))
        for name, text in pages(proof).items():
            while name in copies:
                name = "gaugekit_" + name
            write(self.folder / name, text.encode())
        if len(shards) > 1:
            where = {
                tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard["names"]
            }
            total = sum(shard["bytes"] for shard in shards)
            write(self.folder / INDEX, dump({"metadata": {"total_size": total}, "weight_map": where}))
        write(self.folder / CONFIG, dump(config))
        self._state["written"] = True
        self._staged.save()

    def _flush(self) -> None:
        if self._tensors:
            file = f"shard-{len(self._state['shards']) + 1:05}.safetensors"
            path = self.folder / file
            save_tensors(self._tensors, path)
            size = sum(tensor.nbytes for tensor in self._tensors.values())
            shard = {"file": file, "names": list(self._tensors), "bytes": size, "sha256": sha256(path)}
            self._state["shards"].append(shard)
        self._state["records"] += self._waiting
        self._state["done"] += len(self._waiting)
        self._tensors, self._waiting = {}, []
        self._staged.save()

    def _clear(self, keep: set[str]) -> None:
        """Removes what an earlier run did not get to the end of."""
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A .safetensors file that has its name only once it is whole and on the disk, as readable as any new file."""
    package, temporary = safetensors_package(), path.with_suffix(".tmp")
    write(temporary, b"")  # made by us: safetensors would make it private
    mode = temporary.stat().st_mode
    try:
        package.torch.save_file(tensors, temporary, {"format": "pt"})
    except package.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    temporary.chmod(mode)
    sync(temporary)
    os.replace(temporary, path)


def _final_names(shards: list[dict]) -> list[str]:
    if len(shards) == 1:
        return [WEIGHTS]
    return [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]


def versions(*packages: str) -> dict[str, str]:
    """What computes a result: the versions of gaugekit, torch and the ``packages`` named."""
    found = {"gaugekit": importlib.metadata.version("gaugekit"), "torch": torch.__version__}
    return found | {name: importlib.metadata.version(name) for name in packages}
