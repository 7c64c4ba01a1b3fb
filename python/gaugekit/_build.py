"""What setup.py left beside this file: the binaries, and ``_build.json``, which says why one is missing. No torch here.

Each binary may be missing without anything breaking; ``missed`` says so once, with what mends it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = ("cpu", "cuda", "triton", "codec")  # of all backends
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in gaugekit's source folder)"


@dataclass
class Backend:
    """One way to run our code on this machine: whether it is there, else why not and what mends it."""

    name: str
    loaded: bool
    why: str = ""
    remedy: str = ""
    error: Exception | None = field(default=None, repr=False, compare=False)  # what loading it raised


def place(name: str) -> Path:
    """Where the binary ``name`` stands, if it was built."""
    return FOLDER / f"_{name}.abi3.so"


def missing(name: str) -> Backend | None:
    """Why the binary ``name`` cannot be loaded here; None where it may be tried."""
    path, record = place(name), _record()
    if not path.exists():
        built = record.get(name, {})
        why = built.get("why") or "it was not built when gaugekit was installed"
        return Backend(name, False, why, built.get("remedy") or REBUILD)
    if _sources_differ(record.get("sources")):
        return Backend(name, False, f"{path.name} was built from other sources than those beside it", REBUILD)
    return None


def required() -> list[str]:
    """The names in GAUGEKIT_REQUIRE, which makes it an error that one of them is missing; ImportError for others."""
    names = [name for name in os.environ.get("GAUGEKIT_REQUIRE", "").replace(" ", "").split(",") if name]
    for name in names:
        if name not in NAMES:
            raise ImportError(f"GAUGEKIT_REQUIRE: expected names among {', '.join(NAMES)}; got {name!r}")
    return names


def refuse(backend: Backend) -> None:
    """ImportError: GAUGEKIT_REQUIRE asks for what is not there."""
    raise ImportError(
        f"GAUGEKIT_REQUIRE asks for {backend.name}: {backend.why}. To mend it: {backend.remedy}"
    ) from backend.error


_said: set[str] = set()


def warn(backend: Backend, language: str, stacklevel: int) -> None:
    """One RuntimeWarning for each language that has a binary missing here."""
    if language in _said:
        return
    _said.add(language)
    warnings.warn(
        f"gaugekit runs without its {language} binary (slower, same results): {backend.why}. "
        f"To mend it: {backend.remedy}",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )


def reasons(error: BaseException | None) -> str:
    """The first line of an error and of each that caused it: torch names the file, the linker below it the symbol."""
    lines = []
    while error is not None:
        lines.append((str(error).strip().splitlines() or [repr(error)])[0])
        error = error.__cause__
    return "; ".join(lines)


def _record() -> dict:
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _sources_differ(built_from: str | None) -> bool:
    """Whether csrc stands in the checkout around this package and is not what the binaries were built from.

    A binary whose signatures are older than their callers would crash, not raise.
    """
    root = FOLDER.parents[1]
    if built_from is None or not (root / "csrc").is_dir() or not (root / "setup.py").is_file():
        return False
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest() != built_from
