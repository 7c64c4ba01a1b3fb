"""Certificates: what was verified, by the digests of its weights, so that anyone can tell whether it still is that.

``verify`` writes one of both models, ``convert`` one of what it read and wrote. A model is known by its tensors (name,
dtype, shape and bytes) and the content of its config: files may be sharded or packed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gaugekit.checkpoint.config import CONFIG, is_count, is_number, read_json, shown
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import CERTIFICATE, VERIFICATION, versions
from gaugekit.codec.files.container import seems_packed
from gaugekit.files.durable import digest_of, dump, write

FORMAT = 1
ROLES = {"a": "the original", "b": "the result"}
LONGEST = 4096  # characters of a path: no file system knows longer ones


def _is_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and "\0" not in value


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(step, dict) for step in value)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What is read of a certificate, and of what kind: (in words, whether a value is).
SUMS = ("an object of SHA-256 sums", _is_sums)
PLACE = ("a path", _is_place)
STEPS = ("a list of objects", _is_steps)
SETTINGS = {
    "dtype": ("a string", _is_text),
    "pool": ("null or a string", _or_none(_is_text)),
    "batch_size": ("a positive whole number", is_count),
    "text": ("null or a SHA-256 sum", _or_none(_is_text)),
}
ERRORS = {
    "ok": ("true or false", lambda value: isinstance(value, bool)),
    "noise": ("null or a finite number", _or_none(is_number)),
    "relative_error": ("null or a finite number", _or_none(is_number)),
}


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
            place = Path(os.path.realpath(self.path)).parent / self.places[role]
            if os.path.isdir(place):
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
    return path / VERIFICATION if os.path.isdir(path) else path


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
    if not os.path.isdir(path.parent):
        raise ValueError(
            f"certificate: expected a folder to write it in, got {str(path.parent)!r}, which is none"
        )
    return path


def record(
    path: Path,
    models: Mapping[str, Path],
    settings: Mapping[str, Any],
    errors: Mapping[str, Any],
    steps: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes the certificate of a verification into the new file ``path``, and returns it.

    models: the directories "a" and "b"
    settings: what ``verify`` was asked, by the names of ``SETTINGS``; "text" is its strings or None
    errors: the fields of its report
    steps: what ``rewrites`` says of the result
    """
    text, folder = settings["text"], os.path.realpath(path.parent)
    proof = {
        "gaugekit_verification": FORMAT,
        **{
            role: {"place": os.path.relpath(os.path.realpath(model), folder), "sha256": digests(model)}
            for role, model in models.items()
        },
        "settings": {**settings, "text": None if text is None else digest_of(text)},
        "errors": dict(errors),
        "rewrites": steps,
        "versions": versions("transformers"),
    }
    write(path, dump(proof))
    return proof


def read(certificate: str | Path) -> Certificate:
    """The certificate in a file or a directory: that of ``verify``, or where there is none that of ``convert``.

    ValueError where there is none, or what is there is none.
    """
    path = place(certificate)
    if os.path.isdir(certificate) and not os.path.isfile(path) and os.path.isfile(path.parent / CERTIFICATE):
        path = path.parent / CERTIFICATE
    if not os.path.isfile(path):
        raise ValueError(
            f"certificate: expected a file, or a directory with {VERIFICATION}; got {str(certificate)!r}"
        )
    content = _content(path)
    if "gaugekit_verification" not in content and "output_sha256" in content:
        sums = {"a": "source_sha256", "b": "output_sha256"}
        return Certificate(
            path, {role: _entry(path, content, name, SUMS) for role, name in sums.items()}, True
        )
    if content.get("gaugekit_verification", FORMAT) != FORMAT:
        raise ValueError(
            f"certificate: {path.name} has format {shown(content['gaugekit_verification'])}, not {FORMAT}"
        )
    settings, errors = (
        {name: _entry(path, content, f"{part}.{name}", kind) for name, kind in kinds.items()}
        for part, kinds in (("settings", SETTINGS), ("errors", ERRORS))
    )
    return Certificate(
        path,
        {role: _entry(path, content, f"{role}.sha256", SUMS) for role in ROLES},
        False,
        {role: _entry(path, content, f"{role}.place", PLACE) for role in ROLES},
        settings,
        errors,
    )


def rewrites(folder: Path) -> list[dict[str, Any]]:
    """What ``convert`` did to the result in ``folder``, group by group, where its certificate stands there.

    ValueError where that is none.
    """
    path = folder / CERTIFICATE
    if not os.path.isfile(path):
        return []
    steps = _entry(path, {"steps": [], **_content(path)}, "steps", STEPS)
    return [{name: step[name] for name in ("rewrite", "claim", "removed") if name in step} for step in steps]


def _content(path: Path) -> dict[str, Any]:
    """The JSON object in a certificate; ValueError, naming it, where there is none."""
    try:
        return read_json(path)
    except (OSError, ValueError) as odd:
        reason = str(odd).removeprefix("checkpoint: ")
        raise ValueError(f"certificate: {path.name} is no certificate of gaugekit's: {reason}") from None


def _entry(path: Path, content: dict[str, Any], way: str, kind: tuple[str, Callable[[Any], bool]]) -> Any:
    """The entry of a certificate at ``way``, names with dots between, of that ``kind``; ValueError for another."""
    expected, fits = kind
    what = f"certificate: {path.name} is no certificate of gaugekit's: expected {expected} at {way}"
    value: Any = content
    for name in way.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"{what}, got none")
        value = value[name]
    if not fits(value):
        raise ValueError(f"{what}, got {shown(value)}")
    return value


def _flat(value: Any, path: str = "") -> list[str]:
    """A JSON value as one line for each number or string in it: how it is laid out in a file does not count."""
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _flat(inner, f"{path}/{name}")]
    if isinstance(value, list):
        return [line for index, inner in enumerate(value) for line in _flat(inner, f"{path}/{index}")]
    return [f"{path}={json.dumps(value)}"]
