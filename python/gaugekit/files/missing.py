"""What to do where a model was expected and none stands: it is to be downloaded first, or has another format."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")


def how_to_get(path: Path) -> str:
    """How to make a model directory of ``path``, which is none, "; …": the name of a model on the Hugging Face Hub is
    downloaded, a file of another format converted; empty for anything else.
    """
    name = path.as_posix()
    if path.is_file():
        return how_to_convert(path)
    if not HUB.fullmatch(name) or path.parent.exists() or name.endswith(FILES):
        return ""
    folder = name.rpartition("/")[2]
    return f"; if it is a model of the Hugging Face Hub, download it first: hf download {name} --local-dir {folder}"


def how_to_convert(folder: Path) -> str:
    """How to make the weights in ``folder`` (or the one file it is) safetensors, "; …"; empty where there are none."""
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    gguf = next((file for file in files if file.suffix == ".gguf"), None)
    old = next((file for file in files if file.suffix in (".bin", ".pt", ".pth")), None)
    if gguf is None and old is None:
        return ""
    source = (gguf or old).parent
    options = f", gguf_file={_quoted(gguf.name)}" if gguf is not None else ""
    code = (
        "from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained({_quoted(source)}{options}).save_pretrained({_quoted(f'{source}-safetensors')})"
    )
    kind = (
        "GGUF files (pip install gaugekit[gguf])" if gguf is not None else f"pickled files such as {old.name}"
    )
    return f"; {kind} are converted by transformers (AutoModel for an encoder): python -c {shlex.quote(code)}"


def _quoted(text: str | Path) -> str:
    """A Python string in double quotes, which a shell's single ones may hold."""
    return json.dumps(str(text), ensure_ascii=False)
