"""Opens a Hugging Face directory (config.json + safetensors) as a model and a tokenizer, offline and quietly."""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gaugekit import models
from gaugekit.checkpoint.config import read_config
from gaugekit.checkpoint.dtypes import FLOATS
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.codec.directories.index import INDEX_SUFFIX, check_indices
from gaugekit.files.missing import how_to_convert, how_to_get

# transformers sets torch's default dtype and more while it builds a model: two threads must not undo each other's.
_building = threading.RLock()
_switch = threading.Lock()
_loud: list[tuple[bool, int]] = []  # one entry for each thread that keeps quiet: what it was before the first
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


def transformers() -> Any:
    """The transformers package, with gaugekit's own loaders registered; ImportError naming the extra if absent."""
    try:
        package = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("this needs transformers: pip install gaugekit[hf]") from error
    importlib.import_module("gaugekit.hf.quantizer")
    return package


def directory(path: str | Path, argument: str = "model") -> Path:
    """``path`` as a Path, if a sound config.json and safetensors files stand in it, all that an index names among them;
    else ValueError.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{argument}: expected a model directory, got {str(path)!r}, which is not a directory"
            f"{how_to_get(path)}"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{argument}: expected a config.json in {str(path)!r}, found none{how_to_convert(path)}"
        )
    if not any(path.glob("*.safetensors")):
        hint = how_to_convert(path)
        raise ValueError(f"{argument}: expected .safetensors files in {str(path)!r}, found none{hint}")
    read_config(path)
    check_indices(path, [file.name for file in path.glob("*" + INDEX_SUFFIX)])
    return path


def stored_dtype(path: Path) -> torch.dtype:
    """The floating type most numbers in ``path`` are stored in, packed or not; ValueError for a damaged file."""
    checkpoint = Checkpoint(path)  # the files the model consists of, not others that stand beside them
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint.names():
        if (dtype := checkpoint.dtype(name)) in FLOATS.values():
            numbers[dtype] += math.prod(checkpoint.shape(name))
    if not numbers:
        raise ValueError(f"{path}: expected weights stored as {', '.join(FLOATS)}, found none")
    return numbers.most_common(1)[0][0]


def architecture(path: Path) -> type:
    """The model class named first under ``architectures`` in config.json, else the class AutoModel would take."""
    return _named(read_config(path), path)


def _named(settings: dict, path: str | Path) -> type:
    """``architecture`` of the content of a config.json, which errors call ``path``."""
    package = transformers()
    names = settings.get("architectures") or []
    from gaugekit.hf import sas

    for name in names:
        if (kind := getattr(package, name, None) or getattr(sas, name, None)) is not None:
            return kind
    if names:
        raise ValueError(f"{path}: transformers {package.__version__} has no class {' or '.join(names)}")
    return package.AutoModel


def model(path: Path, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """The model of ``path`` in ``dtype``, in evaluation mode; ``options`` are ``from_pretrained``'s.

    ValueError where weights are missing, since transformers would fill them with random numbers.
    """
    kind = architecture(path)
    stored_dtype(path)
    with _building, quiet(), reading(path):
        loaded, info = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    # A bare encoder reads its pooler for nothing that is compared here, and published ones often lack it.
    bare = type(loaded).__name__.endswith("Model")
    missing = sorted(name for name in info["missing_keys"] if not (bare and name.startswith("pooler.")))
    if missing:
        some = ", ".join(missing[:4])
        raise ValueError(f"{path}: {len(missing)} weights of {type(loaded).__name__} are missing: {some}")
    return loaded.eval()


def skeleton(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of ``path`` with parameters that have a shape but no memory (meta device); its buffers are real."""
    kind, package = architecture(path), transformers()
    settings = config(path)
    make = kind.from_config if kind is package.AutoModel else kind._from_config
    with _building, reading(path):
        # accelerate.init_empty_weights would keep the buffers, but it exchanges torch.nn.Module.register_parameter for
        # the whole process while it builds: a model that another thread makes meanwhile would come out empty, too.
        with torch.device("meta"):
            empty = make(settings, dtype=dtype).eval()
        # Buffers that no file holds (position ids, rotary frequencies) are made anew as from_pretrained makes them:
        # each gets memory, and every module is initialised once more, which costs nothing on the meta device.
        for module in empty.modules():
            module._is_hf_initialized = False
            for name, buffer in module.named_buffers(recurse=False):
                kept = name not in module._non_persistent_buffers_set
                module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=kept)
        empty.initialize_weights()
    return empty.requires_grad_(False)


def shapes(settings: dict, path: str | Path = "config") -> torch.nn.Module:
    """The model that the content of a config.json describes, with shapes but no numbers (meta device).

    ``path`` is what errors call it. Raises ValueError for a config that transformers cannot make a model of.
    """
    package, kind = transformers(), _named(settings, path)
    entries = {name: value for name, value in settings.items() if name != "model_type"}
    with _building, quiet(), reading(path), torch.device("meta"):
        described = package.AutoConfig.for_model(settings["model_type"], **entries)
        make = kind.from_config if kind is package.AutoModel else kind._from_config
        return make(described, dtype=torch.float32).eval()


def tokenizer(path: str | Path) -> Any | None:
    """The tokenizer that stands in ``path``, or None where there is none."""
    path = Path(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet(), reading(path):
        return transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)


def config(path: str | Path) -> Any:
    """The configuration of the model in ``path``, as transformers makes it of config.json."""
    read_config(Path(path))
    with quiet(), reading(path):
        return transformers().AutoConfig.from_pretrained(path, local_files_only=True)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever transformers raises over what stands in ``path`` as a ValueError that names the directory."""
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        package = transformers()
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{path}: transformers {package.__version__} cannot open it: {type(error).__name__}: {reason}"
        ) from error


def home(live: torch.nn.Module) -> Path | None:
    """The directory a live model was loaded from, where that still stands; None for any other model."""
    name = getattr(live.config, "name_or_path", "")
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


def reads(kind: type) -> str:
    """The name of the main input of a model class: "input_ids", "pixel_values", ..."""
    return getattr(kind, "main_input_name", "input_ids")


def positions(config: Any) -> int:
    """How many positions a model has for tokens; 512 where its config names no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = (getattr(text, name, None) for name in LIMITS)
    return min([limit - models.unused_positions(text.to_dict()) for limit in limits if limit] or [512])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the terminal: the caller shows its own progress.

    They are switches of the whole process: the first of several threads turns them off, the last turns them back.
    """
    logging = transformers().utils.logging
    with _switch:
        if not _loud:
            _loud.append((logging.is_progress_bar_enabled(), logging.get_verbosity()))
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        else:
            _loud.append(_loud[0])
    try:
        yield
    finally:
        with _switch:
            bars, verbosity = _loud.pop()
            if not _loud:
                logging.set_verbosity(verbosity)
                if bars:
                    logging.enable_progress_bar()
