"""A checkpoint on disk, read one tensor at a time: a Hugging Face directory of config.json and safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Progress = Callable[[int, int], None]


def safetensors_package():
    """The safetensors package; ImportError naming the extra that brings it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install gaugekit[hf]") from error
    return safetensors


class Checkpoint:
    """A directory with ``config.json`` and ``model.safetensors``, or shards and their index.

    Nothing is read before it is asked for; a tensor asked for is read through a memory map. Raises ValueError, saying
    what was expected, for a directory, config or weights that are missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"checkpoint: expected a directory with config.json and safetensors, got {str(path)!r}"
            )
        self.config: dict = _json(self.path / "config.json")
        self._package = safetensors_package()
        self._open: dict[str, object] = {}
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
        """One tensor, as stored."""
        return self._file(self._find(name)).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file(self._find(name)).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        kind = self._file(self._find(name)).get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"checkpoint: {name} has dtype {kind}; expected one of {', '.join(DTYPES)}")
        return DTYPES[kind]

    def bytes(self, name: str) -> int:
        """The bytes a tensor takes in its file."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def sha256(self, progress: Progress | None = None, total_bytes: int | None = None) -> dict[str, str]:
        """The SHA-256 of every weight file and of config.json, by file name."""
        done = 0
        total = total_bytes or sum((self.path / file).stat().st_size for file in self.files)
        sums = {}
        for file in [*self.files, "config.json"]:
            digest = hashlib.sha256()
            with open(self.path / file, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    done += len(block)
                    if progress and file != "config.json":
                        progress(min(done, total), total)
            sums[file] = digest.hexdigest()
        return sums

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

    def _file(self, file: str):
        if file not in self._open:
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"checkpoint: expected the file {file} in {str(self.path)!r}, got none")
            try:
                self._open[file] = self._package.safe_open(path, "pt")
            except (self._package.SafetensorError, OSError) as error:
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
