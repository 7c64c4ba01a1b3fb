"""A checkpoint on disk, read and written piece by piece: a directory of config.json and safetensors files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .codec import CorruptFile, container, safe_open
from .staging import MANIFEST, Staging, copy, dump, sha256, sync, write

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CERTIFICATE = "gaugekit_certificate.json"
SCRATCH = "gaugekit_scratch"


def safetensors_package():
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
            )
        self.config: dict = _json(self.path / "config.json")
        self._open: dict[str, safe_open] = {}
        self.files: list[str]
        self._where: dict[str, str]
        if (self.path / INDEX).is_file():
            self._where = _weight_map(self.path / INDEX)
            self.files = sorted(set(self._where.values()))
        else:
            self.files = [self._single()]
            self._where = {name: self.files[0] for name in self._file(self.files[0]).keys()}  # noqa: SIM118
        for file in self.files:
            stored = set(self._file(file).keys())
            absent = sorted(
                name for name, where in self._where.items() if where == file and name not in stored
            )
            if absent:
                raise ValueError(
                    f"checkpoint: {INDEX} promises {absent[0]!r} in {file}, which does not hold it"
                )

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
        """The SHA-256 of every weight file and of config.json, by name; ``progress`` is told each block's bytes."""
        return {file: sha256(self.path / file, progress) for file in [*self.files, "config.json"]}

    def _single(self) -> str:
        if (self.path / WEIGHTS).is_file():
            return WEIGHTS
        others = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        hint = " (several .safetensors files but no index)" if others else ""
        if not others and list(self.path.glob("pytorch_model*.bin")):
            hint = " (pytorch_model.bin is not read: load it and save_pretrained it first)"
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
            compact = (
                " (its attention is already in compact form)" if "quantization_config" in self.config else ""
            )
            raise ValueError(f"checkpoint: expected a tensor named {name!r}, got none{compact}")
        return self._where[name]


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint: expected the file {path.name} in {str(path.parent)!r}, got none"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {path.name}, got {type(content).__name__}")
    return content


def _weight_map(path: Path) -> dict[str, str]:
    where = _json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"checkpoint: expected a weight_map of tensor names to files in {path.name}")
    for file in set(where.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"checkpoint: {path.name} names {file!r}; expected a .safetensors file of the directory"
            )
    return where


class Writer:
    """Writes a checkpoint beside its final place, so that a kill loses little and nothing half-done looks whole.

    Tensors go into shards of about ``shard_bytes`` in the folder ``<target>.partial`` (``staging.Staging``), whose
    manifest says what is done, for which job (``identity``, JSON). A new Writer of the same identity goes on after
    ``done`` units; another identity, or ``resume=False``, starts over. ``finish`` names the shards, writes index and
    config, and renames the folder. Every file is flushed to the disk before the manifest or a rename speaks of it.

    Raises ValueError where ``<target>.partial`` is not ours, or another process is writing there.
    """

    def __init__(self, target: Path, identity: dict, *, resume: bool = True, shard_bytes: int = 10**9):
        self.shard_bytes = shard_bytes
        start = {"done": 0, "shards": [], "records": []}
        self._staging = Staging(target, identity, start, resume=resume, sound=_restore)
        self._tensors: dict[str, Tensor] = {}
        self._waiting: list[dict] = []
        if not self._staging.published:
            kept = {shard["file"] for shard in self._state["shards"]}
            self._staging.clean(kept | ({SCRATCH} if self._staging.resumed else set()))
            self._staging.save()

    @property
    def folder(self) -> Path:
        """Where the result grows."""
        return self._staging.folder

    @property
    def scratch(self) -> Path:
        """A folder for what the job itself wants to find again after a kill; it is gone from the result."""
        return self.folder / SCRATCH

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
        return self._staging.state

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
        """Writes the rest and moves everything into place.

        ``certificate`` is given the SHA-256 of every shard, ``pages`` the certificate: {file name: text} to add.
        """
        if not self._staging.published:
            self._flush()
            self._complete(config, certificate, copies, pages)
        self._staging.publish()

    def close(self) -> None:
        """Lets another process at the folder; what is on disk stays for it to go on from."""
        self._staging.close()

    def _complete(
        self, config: dict, certificate: Callable, copies: dict[str, Path], pages: Callable
    ) -> None:
        shards = self._state["shards"]
        names = [WEIGHTS]
        if len(shards) > 1:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, source in copies.items():
            copy(source, self.folder / name)
        for shard, name in zip(shards, names, strict=True):
            os.replace(self.folder / shard["file"], self.folder / name)
        sums = {name: shard["sha256"] for shard, name in zip(shards, names, strict=True)}
        proof = certificate(sums)
        write(self.folder / CERTIFICATE, dump(proof))
        for name, text in pages(proof).items():
            write(self.folder / name, text.encode())
        if len(shards) > 1:
            where = {
                tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard["names"]
            }
            total = sum(shard["bytes"] for shard in shards)
            write(self.folder / INDEX, dump({"metadata": {"total_size": total}, "weight_map": where}))
        write(self.folder / "config.json", dump(config))
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _flush(self) -> None:
        if self._tensors:
            file = f"shard-{len(self._state['shards']) + 1:05}.safetensors"
            path = self.folder / file
            safetensors_package().torch.save_file(self._tensors, path.with_suffix(".tmp"), {"format": "pt"})
            shutil.copymode(self.folder / MANIFEST, path.with_suffix(".tmp"))  # safetensors makes it private
            sync(path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            size = sum(tensor.nbytes for tensor in self._tensors.values())
            shard = {"file": file, "names": list(self._tensors), "bytes": size, "sha256": sha256(path)}
            self._state["shards"].append(shard)
        self._state["records"] += self._waiting
        self._state["done"] += len(self._waiting)
        self._tensors, self._waiting = {}, []
        self._staging.save()


def _restore(folder: Path, state: dict) -> bool:
    """Whether every shard the manifest names is there; those already given their final name get the first back."""
    shards = state["shards"]
    for number, shard in enumerate(shards, 1):
        final = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not (folder / shard["file"]).is_file() and (folder / final).is_file():
            os.replace(folder / final, folder / shard["file"])
    return all((folder / shard["file"]).is_file() for shard in shards)
