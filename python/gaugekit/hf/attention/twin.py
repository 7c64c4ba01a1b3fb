"""A small model of random weights like a given one, and calls that show how its attention behaves."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

TOKENS = 12
VOCABULARY = 256
WINDOW = 5  # shorter than the calls, so that what lies outside of it counts
MOST = 20_000_000  # parameters of a twin
LAYERS = (
    "num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth",
    "n_layers", "num_layers", "n_layer",
)  # fmt: skip
HEADS = (
    "num_attention_heads", "num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads",
    "n_heads", "n_head",
)  # fmt: skip
WIDTHS = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "encoder_hidden_size", "out_hidden_size", "projection_dim",
    "word_embed_proj_dim",
)  # fmt: skip
INNER = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip
NARROWEST = 16  # of INNER, which nothing else must fit
WINDOWS = ("sliding_window", "attention_chunk_size")


def smaller(config: Any) -> Iterator[Any]:
    """Copies of ``config`` for a twin: narrow with few layers, narrow with all, as wide with few; then as it is.

    Heads keep their width, so that what is cut by it (rotary angles and their scales) still fits. Which sizes belong
    together differs by family; a copy that no model can be made of is for the caller to pass over.
    """
    for narrow, few in ((True, True), (True, False), (False, True), (False, False)):
        twin = plain(config)
        for part in _parts(twin):
            _set_vocabulary(part)
            if few:
                _set_layers(part)
            for name in WINDOWS:
                if _size(part, name) > WINDOW:
                    _set(part, name, WINDOW)
        if narrow:
            _set_widths(list(_parts(twin)))
        yield twin


def plain(config: Any) -> Any:
    """A copy of ``config`` that says nothing of how weights are stored, on which attention does not depend."""
    copied = copy.deepcopy(config)
    for part in _parts(copied):
        part.__dict__.pop("quantization_config", None)
    return copied


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _size(config: Any, name: str) -> int:
    """The integer called ``name``, 0 where there is none; a name that stands for another one counts once, as that."""
    value = None if name in getattr(config, "attribute_map", {}) else getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _set(config: Any, name: str, value: Any) -> None:
    with contextlib.suppress(AttributeError):  # computed from others: it follows them
        setattr(config, name, value)


def _set_vocabulary(config: Any) -> None:
    if getattr(config, "vocab_size", 0) <= VOCABULARY:
        return
    config.vocab_size = VOCABULARY
    for name, value in list(vars(config).items()):
        if name.endswith(("token_id", "token_index")):
            if isinstance(value, int):
                setattr(config, name, value % VOCABULARY)
            elif isinstance(value, list):
                setattr(config, name, [token % VOCABULARY for token in value])


def _set_layers(config: Any) -> None:
    """Two layers, or one of each kind that ``layer_types`` names."""
    kinds = getattr(config, "layer_types", None) or []
    for name in LAYERS:
        if (count := _size(config, name)) > 2:
            kept = {kinds.index(kind) for kind in kinds if len(kinds) == count}
            kept = sorted(kept | set(range(2 if len(kept) < 2 else 0)))[: max(2, len(kept))]
            for other, values in list(vars(config).items()):
                if isinstance(values, (list, tuple)) and len(values) == count:
                    _set(config, other, type(values)(values[index] for index in kept))
            _set(config, name, len(kept))


def _set_widths(configs: list[Any]) -> None:
    """Divides heads and widths by what all have in common, since parts fit each other by their widths."""
    heads = [size for part in configs for name in HEADS if (size := _size(part, name))]
    widths = [size for part in configs for name in WIDTHS if (size := _size(part, name))]
    common = math.gcd(*heads, *widths)
    if min(heads, default=0) == common and common > 2 and common % 2 == 0:
        common //= 2  # two heads tell whose keys are whose
    for part in configs:
        for name in HEADS + WIDTHS:
            if size := _size(part, name):
                _set(part, name, size // common)
        for name in INNER:
            if _size(part, name) > NARROWEST:
                _set(part, name, NARROWEST)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Numbers drawn inside are the same each time, and leave no trace outside; tensors are made on the CPU."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def make(kind: type, config: Any, implementation: str) -> nn.Module:
    """A model of class ``kind`` in float32, every parameter random: ValueError where it would be too large."""
    config._attn_implementation = implementation
    config.dtype = torch.float32
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if count > MOST:
        raise ValueError(f"a twin would have {count} parameters")
    twin = kind(config).float().eval()
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        else:  # gains and what starts at zero, which would hide what it scales
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return twin


def calls(twin: nn.Module) -> list[Callable[[], list[Tensor]]]:
    """What to run: each returns the tensors to compare, padding left out."""
    main, accepted = twin.main_input_name, inspect.signature(twin.forward).parameters
    given = inputs(twin)
    runs: list[Callable[[], list[Tensor]]] = [lambda: _outputs(twin, given)]
    if main != "input_ids" or "attention_mask" not in accepted:
        return runs
    right = torch.ones(2, TOKENS, dtype=torch.int64)
    right[1, TOKENS - 5 :] = 0
    for mask in (right, right.flip(1)):
        runs.append(lambda mask=mask: _outputs(twin, given | {"attention_mask": mask}))
    if getattr(twin, "can_generate", bool)():
        runs.append(lambda: _generated(twin, given["input_ids"], right.flip(1)))
    return runs


def inputs(twin: nn.Module) -> dict[str, Tensor]:
    """Made-up arguments of a forward, two sequences of ``TOKENS`` where it reads tokens.

    ValueError where none can be made up.
    """
    config, main, accepted = twin.config, twin.main_input_name, inspect.signature(twin.forward).parameters
    ids = torch.randint(3, max(4, getattr(config.get_text_config(), "vocab_size", 0) or 4), (2, TOKENS))
    target = {"decoder_input_ids": ids.flip(1)[:, :7]} if "decoder_input_ids" in accepted else {}
    if "grid_thw" in accepted:  # patches of images of several sizes, one after the other
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
        return {"hidden_states": torch.randn(int(grid.prod(1).sum()), width), "grid_thw": grid}
    if main == "input_ids":
        dual = "pixel_values" in accepted and "logit_scale" in dict(twin.named_parameters())
        return {"input_ids": ids} | target | ({"pixel_values": _images(config.vision_config)} if dual else {})
    if main == "pixel_values":
        return {main: _images(getattr(config, "vision_config", None) or config)}
    if main == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        return {
            main: torch.randn(2, 4000) if bins is None else torch.randn(2, config.max_length, bins)
        } | target
    if main == "input_features":
        return {main: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)} | target
    raise ValueError(f"no {main} can be made up")


def _images(config: Any) -> Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, getattr(config, "num_channels", 3), height, width)


def _outputs(twin: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    first = next(x for x in twin(**inputs).to_tuple() if isinstance(x, Tensor) and x.is_floating_point())
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs:
        return [first]
    if first.dim() > 2 and first.shape[:2] == mask.shape:
        return [first[mask.bool()]]
    return [first] if mask[:, 0].all() else []  # one vector a sequence, perhaps of its first row


def _generated(twin: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits of three tokens after a prompt, through the cache."""
    out = twin.generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_logits=True, pad_token_id=0,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    return list(out.logits)
