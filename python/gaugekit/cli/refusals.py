"""The one line that stands on stderr for an error: what was expected, what came, and where to look."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from typing import NoReturn, TextIO

from gaugekit.cli import streams

EXTRA_OF = {
    "transformers": "hf",
    "tokenizers": "hf",
    "safetensors": "hf",
    "tqdm": "hf",
    "gguf": "gguf",
    "zstandard": "demo",
    "zipnn": "bench",
    "triton": "triton",
    "fastapi": "serving",
    "uvicorn": "serving",
    "openai": "serving",
}
LONGEST = 400  # characters shown of an error that was not foreseen: some libraries write pages
# what argparse says -> the same as everything else here is said
SENTENCES = (
    (r"the following arguments are required: (.*)", r"expected \1, got none"),
    (r"unrecognized arguments: (.*)", r"expected arguments that this verb has, got \1"),
    (r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1: expected one of \3, got \2"),
    (r"argument (\S+): invalid (\w+) value: (.*)", r"\1: expected a value of type \2, got \3"),
    (r"argument (\S+): not allowed with argument (\S+)", r"expected \1 or \2, got both"),
    (r"argument (\S+): (.*)", r"\1: \2"),
)


class UsageError(ValueError):
    """Bad usage: the command line was not what the verb takes. ``program``: whose ``--help`` says what it takes."""

    def __init__(self, message: str, program: str | None = None):
        super().__init__(message)
        self.program = program


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are exceptions, so that every error takes the same one-line way out."""

    def error(self, message: str) -> NoReturn:
        for pattern, sentence in SENTENCES:
            if match := re.fullmatch(pattern, message):
                message = match.expand(sentence)
                break
        # the root meets arguments that are nobody's, but the verb's help says which there are
        raise UsageError(message, None if "that this verb has" in message else self.prog)

    def print_help(self, file: TextIO | None = None) -> None:
        if streams.lost(streams.put(file or sys.stdout, self.format_help().rstrip("\n"))):
            self.exit(2)


def explained(argv: list[str], error: Exception) -> str:
    """What is printed for ``error`` of the command line ``argv``."""
    verb = f"gaugekit {argv[0]}" if argv and not argv[0].startswith("-") else "gaugekit"
    if isinstance(error, UsageError):
        program = error.program or verb
        return f"{program}: {error}; see {program} --help"
    if isinstance(error, ImportError):
        if extra := EXTRA_OF.get((error.name or "").partition(".")[0]):
            return f"{verb}: needs {error.name}: pip install gaugekit[{extra}]"
        if "pip install" in str(error):
            return f"{verb}: {error}"
    if isinstance(error, ValueError | OSError) and str(error):
        return f"{verb}: {error}"
    if isinstance(error, MemoryError):
        return f"{verb}: the memory of this machine is not enough ({error or 'an allocation failed'})"
    if isinstance(error, RecursionError):
        return f"{verb}: the input is nested more deeply than can be read ({error})"
    shown = textwrap.shorten(str(error), LONGEST, placeholder=" …")
    return f"{verb}: unexpected {type(error).__name__}: {shown} (GAUGEKIT_TRACEBACK=1 shows where)"
