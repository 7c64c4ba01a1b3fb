"""Certificates: what was verified, by the digests of its weights, so that anyone can tell whether it still is that.

``verify`` writes one of both models, ``convert`` one of what it read and wrote. A model is known by its tensors (name,
dtype, shape and bytes) and the content of its config: files may be sharded or packed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gaugekit.checkpoint.config import CONFIG, read_json
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import CERTIFICATE, VERIFICATION, versions
from gaugekit.codec.files.container import seems_packed
from gaugekit.files.durable import digest_of, dump, write

FORMAT = 1
ROLES = {"a": "the original", "b": "the result"}
SETTINGS = ("dtype", "pool", "batch_size", "text")


@dataclass(frozen=True)
class Certificate:
    """What a certificate says. ``path``: its file. ``models``: {"a", "b": {name: SHA-256}} of tensors, or of files
    where ``by_file``. ``places``: where they stood, as seen from its folder. ``settings`` of ``verify``, the SHA-256 of
    its text among them (None: the default text), and the ``errors`` it found; both empty in one of ``convert``.
    """

    path: Path
    models: dict[str, dict[str, str]]
    by_file: bool
    places: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)

    def model(self, role: str, given: str | Path | None) -> Path:
        """Where model ``role`` stands: ``given``, else its place of then; ValueError where neither is a directory."""
        if given is None and role == "b" and self.by_file:
            return self.path.parent
        if given is None and role in self.places:
            place = self.path.parent / self.places[role]
            if place.is_dir():
                return place
            raise ValueError(
                f"{role}: expected {ROLES[role]} at {str(place)!r}, where the certificate saw it, found no directory "
                "there; say where it is"
            )
        if given is None:
            raise ValueError(
                f"{role}: expected {ROLES[role]}, whose place {self.path.name} does not name; got none"
            )
        return Path(given)

    def refuse_changes(self, role: str, path: Path) -> None:
        """ValueError, by name, for a tensor, a config or a file that is not what the certificate speaks of."""
        promised = self.models[role]
        if self.by_file:
            if role == "b" and (
                packed := [name for name in Checkpoint(path).files if seems_packed(path / name)]
            ):
                raise ValueError(
                    f"certificate: {packed[0]} in {str(path)!r} is packed, and {self.path.name} speaks of the files "
                    "before; let verify write one of both models"
                )
            stored = Checkpoint(path).sha256()
            stored = {name: digest for name, digest in stored.items() if name in promised or name != CONFIG}
        else:
            stored = digests(path)
        changed = sorted(
            name for name in promised.keys() | stored.keys() if promised.get(name) != stored.get(name)
        )
        if not changed:
            return
        name = changed[0]
        what = (
            "is missing from"
            if name not in stored
            else "was added to"
            if name not in promised
            else "was changed in"
        )
        more = f" (and {len(changed) - 1} others)" if len(changed) > 1 else ""
        raise ValueError(
            f"certificate: {name}{more} {what} {ROLES[role]}, {str(path)!r}, since it was certified"
        )


def digests(path: Path) -> dict[str, str]:
    """{tensor: SHA-256 of its dtype, shape and bytes} of a model directory, and that of the content of its config."""
    checkpoint = Checkpoint(path)
    sums = {CONFIG: digest_of(sorted(_flat(read_json(path / CONFIG))))}
    for name in checkpoint.names():
        tensor = checkpoint.read(name).contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        sums[name] = digest.hexdigest()
    return sums


def place(certificate: str | Path) -> Path:
    """The file of a certificate: ``certificate`` itself, or the usual name in that directory."""
    path = Path(certificate)
    return path / VERIFICATION if path.is_dir() else path


def check_free(certificate: str | Path, models: Mapping[str, object]) -> Path:
    """``place``, if one of both ``models`` can be written there: new, in a folder that is there, and both directories.

    Else ValueError.
    """
    path = place(certificate)
    for role, model in models.items():
        if not isinstance(model, str | Path):
            raise ValueError(
                f"certificate: expected {role} to be a model directory, got {type(model).__name__}"
            )
    if os.path.lexists(path):
        raise ValueError(f"certificate: expected a new file, got {str(path)!r}, which exists")
    if not path.parent.is_dir():
        raise ValueError(
            f"certificate: expected a folder to write it in, got {str(path.parent)!r}, which is none"
        )
    return path


def record(
    path: Path, models: Mapping[str, Path], settings: Mapping[str, Any], errors: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the certificate of a verification into the new file ``path``, and returns it.

    models: the directories "a" and "b"
    settings: what ``verify`` was asked, by the names of ``SETTINGS``; "text" is its strings or None
    errors: the fields of its report
    """
    text = settings["text"]
    proof = {
        "gaugekit_verification": FORMAT,
        **{
            role: {"place": os.path.relpath(model, path.parent), "sha256": digests(model)}
            for role, model in models.items()
        },
        "settings": {**settings, "text": None if text is None else digest_of(text)},
        "errors": dict(errors),
        "rewrites": _rewrites(models["b"]),
        "versions": versions("transformers"),
    }
    write(path, dump(proof))
    return proof


def read(certificate: str | Path) -> Certificate:
    """The certificate in a file or a directory: that of ``verify``, or where there is none that of ``convert``.

    ValueError where there is none, or what is there is none.
    """
    path = place(certificate)
    if Path(certificate).is_dir() and not path.is_file() and (path.parent / CERTIFICATE).is_file():
        path = path.parent / CERTIFICATE
    if not path.is_file():
        raise ValueError(
            f"certificate: expected a file, or a directory with {VERIFICATION}; got {str(certificate)!r}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (
            isinstance(content, dict)
            and "gaugekit_verification" not in content
            and "output_sha256" in content
        ):
            models = {"a": content["source_sha256"], "b": content["output_sha256"]}
            return Certificate(path, {role: dict(sums) for role, sums in models.items()}, True)
        if content["gaugekit_verification"] != FORMAT:
            raise ValueError(
                f"certificate: {path.name} has format {content['gaugekit_verification']!r}, not {FORMAT}"
            )
        return Certificate(
            path,
            {role: dict(content[role]["sha256"]) for role in ROLES},
            False,
            {role: str(content[role]["place"]) for role in ROLES},
            {name: content["settings"][name] for name in SETTINGS},
            dict(content["errors"]),
        )
    except (
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        RecursionError,
    ) as odd:
        raise ValueError(f"certificate: {path.name} is no certificate of gaugekit's: {odd}") from odd


def _rewrites(path: Path) -> list[dict[str, Any]]:
    """What ``convert`` did to the result, group by group, where its certificate stands there."""
    if not (path / CERTIFICATE).is_file():
        return []
    steps = read_json(path / CERTIFICATE).get("steps", [])
    return [{name: step[name] for name in ("rewrite", "claim", "removed") if name in step} for step in steps]


def _flat(value: Any, path: str = "") -> list[str]:
    """A JSON value as one line for each number or string in it: how it is laid out in a file does not count."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _flat(inner, f"{path}/{name}")]
    if isinstance(value, list):
        return [line for index, inner in enumerate(value) for line in _flat(inner, f"{path}/{index}")]
    return [f"{path}={json.dumps(value)}"]
