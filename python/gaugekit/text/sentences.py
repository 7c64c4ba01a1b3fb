"""Text as sentences: one rule that cuts it, Python's own documentation as the default, files and lists as given."""

from __future__ import annotations

import re
from pathlib import Path

SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z\"'])")
SHORTEST, LONGEST = 40, 400  # characters of a sentence; below stand titles, above tables and lists


def split(text: str) -> list[str]:
    """Cuts plain text into sentences, in order, each once. The rule:

    1. a paragraph is what stands between blank lines; one whose first line is indented (code) or that
       holds a line of ruling (``====``, ``****``, ``----``: a title) is dropped;
    2. a leading list mark (``* ``, ``- ``, ``1. ``) goes, runs of white space become one space;
    3. a sentence ends at ``.``, ``!`` or ``?``, a closing quote or bracket included, before a space and a
       capital letter or an opening quote, or at the end of the paragraph; ``e.g.`` and ``i.e.`` end none;
    4. kept is what starts with a capital letter, ends in ``.``, ``!`` or ``?`` and has 40 to 400 characters;
    5. of equal sentences the first is kept.
    """
    sentences: dict[str, None] = {}
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").strip("\n")):
        if paragraph[:1].isspace() or re.search(r"^[=*\-~]{3,}[ \t]*$", paragraph, re.MULTILINE):
            continue
        line = " ".join(re.sub(r"^([*\-]|[0-9]+\.)[ \t]+", "", paragraph).split())
        for piece in SENTENCE_END.split(line):
            if SHORTEST <= len(piece) <= LONGEST and re.match(r"[A-Z]", piece) and piece[-1] in ".!?":
                sentences[piece] = None
    return list(sentences)


def sentences(count: int = 500) -> list[str]:
    """The first ``count`` sentences of ``pydoc_data.topics``, topics in alphabetical order, cut by ``split``.

    The same for every Python whose topics read the same; the text changes a little between Python versions.
    Raises ValueError where ``count`` is not positive or there are not so many.
    """
    from pydoc_data.topics import topics

    every = split("\n\n".join(topics[name] for name in sorted(topics)))
    if not 1 <= count <= len(every):
        raise ValueError(f"count: expected 1 to {len(every)} sentences, got {count}")
    return every[:count]


def content(text: str | Path, argument: str = "text") -> str:
    """A UTF-8 file as it stands; ValueError, naming the caller's ``argument``, where there is none."""
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: expected a UTF-8 text file, got {str(text)!r}: {error}") from error


def read(text: str | Path | list[str]) -> list[str]:
    """The sentences of a UTF-8 file, cut by ``split``; a list of strings is taken as it is.

    Raises ValueError naming ``text`` where the file cannot be read or holds no sentence.
    """
    if isinstance(text, list | tuple):
        strings = [str(piece) for piece in text]
        source = "a list"
    else:
        source, strings = repr(str(text)), split(content(text))
    if not strings:
        raise ValueError(
            f"text: expected sentences of {SHORTEST} to {LONGEST} characters, from a capital letter to a full stop; "
            f"{source} holds none"
        )
    return strings
