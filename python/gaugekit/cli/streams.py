"""Standard output and error as a process may find them: closed, on a full disk, or pipes whose reader has gone."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def secure() -> bool:
    """Puts the null device in the place of standard streams that were closed when the process began.

    Otherwise the next file to be opened would get the descriptor of one, and what a library prints to standard error
    would stand in that file. Returns whether there is a standard output to print to.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_null(descriptor)
    printable = sys.stdout is not None
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the process's own, to its end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the process's own, to its end
    return printable


def put(stream: TextIO, text: str) -> OSError | None:
    """Writes ``text`` and a line end, characters the stream has no code for as escapes; the error where it cannot."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    except OSError as error:
        _abandon(stream)
        return error
    return flush(stream)


def flush(stream: TextIO) -> OSError | None:
    """Sends on what waits in the stream; the error where that fails, and nothing raises again as the process ends."""
    try:
        stream.flush()
    except OSError as error:
        _abandon(stream)
        return error
    return None


def lost(error: OSError | None) -> bool:
    """Whether what was printed did not arrive, although a reader waits for it (one that has gone, | head, does not)."""
    return error is not None and not isinstance(error, BrokenPipeError)


def _abandon(stream: TextIO) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return  # no descriptor behind it: a stream in memory
    _to_null(descriptor)


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    if null != descriptor:
        os.close(null)
    else:
        os.set_inheritable(descriptor, True)
