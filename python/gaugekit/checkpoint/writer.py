"""A checkpoint on disk, written piece by piece, so that a kill loses little."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaugekit import __version__
from gaugekit.checkpoint.config import CONFIG
from gaugekit.checkpoint.reader import INDEX, WEIGHTS
from gaugekit.files.durable import copy, dump, replacement, sha256, write
from gaugekit.files.staging import OWN, Staging

CERTIFICATE = "gaugekit_certificate.json"
VERIFICATION = "gaugekit_verification.json"
SCRATCH = "gaugekit_scratch"


def safetensors_package():
    """The safetensors package; ImportError naming the extra that brings it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("writing a checkpoint needs safetensors: pip install gaugekit[hf]") from error
    return safetensors


class Writer:
    """Writes a checkpoint piece by piece into ``folder`` of a place of work, so that a kill loses little.

    Tensors go into shards of about ``shard_bytes``; the manifest of ``staged`` says how many units are ``done``, which
    ``shards`` hold them, and whether the whole was ``written``. A new Writer goes on from there. ``finish`` names the
    shards and writes what stands beside them, index and config last. Every file is flushed to the disk before the
    manifest speaks of it.
    """

    def __init__(self, staged: Staging, folder: Path, *, shard_bytes: int = 5 * 10**8):
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
    package = safetensors_package()
    with replacement(path) as temporary:
        try:
            package.torch.save_file(tensors, temporary, {"format": "pt"})
        except package.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def _final_names(shards: list[dict]) -> list[str]:
    if len(shards) == 1:
        return [WEIGHTS]
    return [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]


def versions(*packages: str) -> dict[str, str]:
    """What computes a result: the versions of gaugekit, torch and the ``packages`` named."""
    ours = {"gaugekit": __version__, "torch": torch.__version__}
    return ours | {name: importlib.metadata.version(name) for name in packages}
