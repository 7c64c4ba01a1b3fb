"""config.json as it is read everywhere: refused in one sentence where it is no JSON object, or its entries are of odd
types, before anything is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
LARGEST = 2**31 - 1  # a count beyond it is a slip: no tensor of a model has as many rows
DEEPEST = 10_000  # layers; a loader would build more of them for hours before it missed their weights
# Counts that every family writes under one of these names; some give a list, one for each layer.
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_positions",
    "n_inner",
    "n_embed",
    "d_model",
    "d_kv",
    "dim",
    "num_heads",
    "n_heads",
    "num_kv_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "num_hidden_groups",
    "inner_group_num",
)
PARTS = ("text_config", "vision_config")  # the configs of a model's parts, entries like its own in them


def read_json(path: Path) -> dict:
    """The JSON object in the file ``path``; ValueError where there is none, naming what stands there instead."""
    if not path.is_file():
        raise ValueError(f"checkpoint: expected the file {path.name} in {str(path.parent)!r}, got none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content)  # what nests too deeply to be written again is found now, not after the work
    except UnicodeDecodeError as error:
        raise ValueError(f"checkpoint: {path.name} is not UTF-8: {error}") from None
    except ValueError as error:
        raise ValueError(f"checkpoint: {path.name} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"checkpoint: {path.name} nests more deeply than can be read") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {path.name}, got {shown(content)}")
    return content


def read_config(folder: Path, name: str = CONFIG) -> dict:
    """The content of ``config.json`` in ``folder``, its entries checked; null for ``quantization_config`` means none,
    so it is left out. ``name`` is the file's where it is called otherwise. ValueError as ``read_json``, and naming the
    first entry of an odd type.
    """
    return check_config(read_json(folder / name), name)


def check_config(config: dict, name: str = CONFIG) -> dict:
    """``read_config`` of the content itself, which errors call ``name``."""
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]
    _check_entries(config, name)
    for part in PARTS:
        _check_entries(config.get(part) or {}, f"{name}: {part}")
    return config


def _check_entries(config: dict, where: str) -> None:
    for name, (expected, fits) in _EXPECTED.items():
        value = config.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {name}: expected {expected}, got {shown(value)}")


def stored_as(config: Mapping) -> str | None:
    """The ``quant_method`` of weights that are not plain ("gaugekit", "gptq", ...); None where they are."""
    quantization = config.get("quantization_config")
    return None if quantization is None else quantization["quant_method"]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _is_size(value: Any) -> bool:
    return all(map(is_count, value)) if isinstance(value, list) else is_count(value)


def _is_depth(value: Any) -> bool:
    return _is_size(value) and (isinstance(value, list) or value <= DEEPEST)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e308 < value < 1e308


def _is_quantization(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("quant_method"), str)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int | float) for item in value)


def _a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_type": ("a string", _a(str)),
    "architectures": ("a list of strings", _is_strings),
    "quantization_config": ("null or an object with a quant_method", _is_quantization),
    **dict.fromkeys(SIZES, (f"a whole number from 1 to {LARGEST}", _is_size)),
    **dict.fromkeys(DEPTHS, (f"a whole number from 1 to {DEEPEST}", _is_depth)),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling", "attn_config", *PARTS), ("null or an object", _a(dict))
    ),
    "layer_types": ("null or a list of strings", _is_strings),
    "no_rope_layers": ("null or a list of numbers", _is_numbers),
    **dict.fromkeys(
        (
            "rope_theta",
            "partial_rotary_factor",
            "rotary_pct",
            "rotary_emb_base",
            "rotary_dim",
            "attention_multiplier",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "clip_qkv",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "rms_norm_eps",
            "initializer_range",
        ),
        ("a finite number", is_number),
    ),
    **dict.fromkeys(
        (
            "is_decoder",
            "add_cross_attention",
            "attention_bias",
            "use_qkv_bias",
            "qk_layernorm",
            "use_qk_norm",
            "use_bias",
            "multi_query",
            "new_decoder_architecture",
            "alibi",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
            "is_encoder_decoder",
            "qkv_bias",
        ),
        ("true or false", _a(bool)),
    ),
    "position_embedding_type": ("a string", _a(str)),
}


def shown(value: Any) -> str:
    """A value in an error: as JSON has it, or its kind where that would be long."""
    try:
        text = json.dumps(value)
    except ValueError:  # a number of more digits than Python writes
        text = ""
    if text and len(text) <= 60:
        return text
    kinds = {dict: "an object", list: "a list", str: "a long string"}
    return kinds.get(type(value), "a number of many digits")


__all__ = [
    "CONFIG",
    "check_config",
    "is_count",
    "is_number",
    "read_config",
    "read_json",
    "shown",
    "stored_as",
]
