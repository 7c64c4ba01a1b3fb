"""The proof: how far a rewritten model stands from its original, beside the noise of the arithmetic itself.

``gaugekit.verify(a, b)`` is the verb; this module is callable so that the name means the same whatever was imported
first.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import samples
from .report import Report

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# An exact rewrite may err as the original does, and a little more: its factors are rounded once again.
NOISE_FACTOR = {torch.float32: 1.5, torch.float16: 1.2, torch.bfloat16: 1.2}
FLOAT64_BOUND = 1e-12
OUTPUTS = ("logits", "prediction_logits", "last_hidden_state")  # the first that a model gives is compared


def verify(
    a: str | Path | torch.nn.Module,
    b: str | Path | torch.nn.Module,
    *,
    text: str | Path | list[str] | None = None,
    dtype: str | torch.dtype | None = None,
    pool: str | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Runs original ``a`` and result ``b`` on the same text and measures how far apart their outputs are.

    With y(M, dtype) all outputs of model M in ``dtype`` and the reference r = y(a, float64):

        noise          = ‖y(a, dtype) − r‖ / ‖r‖          what the dtype itself costs the original
        relative_error = ‖y(b, dtype) − r‖ / ‖r‖          the same for the result
        max_abs_error  = max |y(b, dtype) − y(a, dtype)|   over every number of the output
        min_cosine     = min cos(y(b, dtype), y(a, dtype)) over the rows of the output

    all computed in float64. Outputs are the logits where the model has a head, else last_hidden_state, at unpadded
    positions; ``pool="mean"`` takes the last hidden states averaged over each text and scaled to length 1 instead.
    ``layers`` gives noise and relative_error of each hidden state, the embedding's first. ``ok`` is the claim of an
    exact rewrite: relative_error ≤ 1.5 noise in float32, ≤ 1.2 noise in bfloat16 and float16, ≤ 1e-12 in float64; an
    output that is not finite is never ok, and what cannot be computed from it is None.

    ``a`` and ``b`` are model directories or live transformers models. A live model is never altered: where it has
    another dtype or is in training mode, a copy is used. Memory: ``a`` in float64, ``a`` and ``b`` in ``dtype``, and
    the outputs of one batch. ``dtype`` is a name or a torch dtype; the default is the one ``a`` is stored in.
    ``text`` is a UTF-8 file (or a list of strings); the default is 500 English sentences where there is a tokenizer,
    else 64 sequences of seeded random ids. ``progress(done, total)`` counts sequences.

    Raises ValueError for a directory without config.json, weights or a known architecture, for models of different
    vocabularies or output shapes, and for text without a tokenizer; ImportError where transformers is absent.
    """
    if pool not in (None, "mean"):
        raise ValueError(f"pool: expected None or 'mean', got {pool!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
    original, result = _Subject(a, "a"), _Subject(b, "b")
    working = _dtype(dtype) if dtype is not None else original.dtype()
    notes: list[str] = []
    sequences, pad = _sequences(original, result, text, notes)

    reference = original.model(torch.float64)
    plain = reference if working == torch.float64 else original.model(working)
    rewritten = result.model(working)
    output, layers = _Error(), []
    done = 0
    with torch.no_grad():
        for ids, mask in samples.batches(sequences, batch_size, pad):
            r = _run(reference, ids, mask, pool)
            p = r if plain is reference else _run(plain, ids, mask, pool)
            y = _run(rewritten, ids, mask, pool)
            if y.name != r.name or y.rows.shape != r.rows.shape:
                raise ValueError(
                    f"b: expected {r.name} of shape {list(r.rows.shape)} as from a, got {y.name} {list(y.rows.shape)}"
                )
            output.add(r.rows, p.rows, y.rows)
            if [h.shape for h in y.hidden] == [h.shape for h in r.hidden]:
                layers = layers or [_Error() for _ in r.hidden]
                for error, *hidden in zip(layers, r.hidden, p.hidden, y.hidden, strict=True):
                    error.add(*hidden)
            done += len(ids)
            if progress is not None:
                progress(done, len(sequences))
    if not layers:
        notes.append("layers: not compared, since hidden states are missing or differ in number or width")

    noise, relative_error = output.noise(), output.relative_error()
    if relative_error is None:
        notes.append(f"the result is not finite in {output.broken} of {output.rows:,} rows")
    if noise is None:
        notes.append(f"the original itself is not finite in {_name(working)}")
    finite = noise is not None and relative_error is not None
    bound = FLOAT64_BOUND if working == torch.float64 else NOISE_FACTOR[working] * (noise or 0.0)
    fields = {
        "ok": finite and relative_error <= bound,
        "noise": noise,
        "relative_error": relative_error,
        "max_abs_error": output.max_abs if finite else None,
        "min_cosine": output.min_cosine if finite else None,
        "dtype": _name(working),
        "output": r.name,
        "rows": output.rows,
        "layers": [
            {"layer": index, "noise": error.noise(), "relative_error": error.relative_error()}
            for index, error in enumerate(layers)
        ],
    }
    return Report("verify", fields, notes)


@dataclass
class _Output:
    """What one model gave for one batch, float64 on the CPU: output rows [N, width], hidden states [N, D] each."""

    name: str
    rows: torch.Tensor
    hidden: list[torch.Tensor]


@dataclass
class _Error:
    """Running sums of the squared errors of ``p`` (the original) and ``y`` (the result) against ``r``."""

    reference: float = 0.0
    of: dict[str, float] = field(default_factory=lambda: {"p": 0.0, "y": 0.0})
    max_abs: float = 0.0
    min_cosine: float = 1.0
    rows: int = 0
    broken: int = 0

    def add(self, r: torch.Tensor, p: torch.Tensor, y: torch.Tensor) -> None:
        self.reference += r.square().sum().item()
        self.of["p"] += (p - r).square().sum().item()
        self.of["y"] += (y - r).square().sum().item()
        self.rows += len(r)
        self.broken += int((~y.isfinite()).any(-1).sum())
        self.max_abs = max(self.max_abs, (y - p).abs().max().item())
        norms = y.norm(dim=-1) * p.norm(dim=-1)
        cosine = torch.where(norms > 0, (y * p).sum(-1) / norms, (y == p).all(-1).double())
        self.min_cosine = min(self.min_cosine, cosine.min().item())

    def _relative(self, which: str) -> float | None:
        if not (math.isfinite(self.reference) and math.isfinite(self.of[which])):
            return None
        if self.of[which] == 0:
            return 0.0
        return math.sqrt(self.of[which] / self.reference) if self.reference else None

    def noise(self) -> float | None:
        return self._relative("p")

    def relative_error(self) -> float | None:
        return self._relative("y")


class _Subject:
    """A directory or a live model under one roof: its config, its tokenizer, itself in any dtype."""

    def __init__(self, source: str | Path | torch.nn.Module, argument: str):
        from .integrations import loading

        self.argument = argument
        self.live = source if isinstance(source, torch.nn.Module) else None
        self.path = None
        if self.live is None:
            self.path = loading.directory(source, argument)
            self.config = loading.transformers().AutoConfig.from_pretrained(self.path, local_files_only=True)
        elif hasattr(source, "config"):
            self.config = source.config
            self.path = loading.home(source)
        else:
            raise ValueError(
                f"{argument}: expected a model directory or a live transformers model, got {type(source).__name__}"
            )
        if getattr(self.config, "is_encoder_decoder", False):
            raise ValueError(f"{argument}: expected an encoder or a decoder, got an encoder-decoder model")

    def dtype(self) -> torch.dtype:
        from .integrations import loading

        if self.live is None:
            return loading.stored_dtype(self.path)
        numbers: dict[torch.dtype, int] = {}
        for parameter in self.live.parameters():
            if parameter.is_floating_point():
                numbers[parameter.dtype] = numbers.get(parameter.dtype, 0) + parameter.numel()
        if not numbers:
            raise ValueError(f"{self.argument}: expected a model with floating-point parameters, found none")
        return max(numbers, key=numbers.get)

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        from .integrations import loading

        if self.live is None:
            return loading.model(self.path, dtype)
        state = [*self.live.parameters(), *self.live.buffers()]
        ready = all(tensor.dtype == dtype for tensor in state if tensor.is_floating_point())
        if ready and not any(module.training for module in self.live.modules()):
            return self.live
        return copy.deepcopy(self.live).to(dtype).eval()

    def tokenizer(self) -> Any | None:
        from .integrations import loading

        return loading.tokenizer(self.path) if self.path is not None else None


def _sequences(original: _Subject, result: _Subject, text, notes: list[str]) -> tuple[list[list[int]], int]:
    """Token ids to run both models on, and the id that pads them."""
    from .integrations import loading

    sizes = [getattr(subject.config.get_text_config(), "vocab_size", None) for subject in (original, result)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"b: expected the vocabulary of a, {sizes[0]} tokens, got {sizes[1]}")
    longest = min(loading.positions(subject.config) for subject in (original, result))
    pad = getattr(original.config, "pad_token_id", None)
    tokenizers = [found for subject in (original, result) if (found := subject.tokenizer()) is not None]
    if not tokenizers:
        if text is not None:
            raise ValueError("text: expected a tokenizer beside the model to read text with, found none")
        if not sizes[0]:
            raise ValueError("a: expected a vocab_size in its config, found none")
        notes.append("text: no tokenizer was found, so seeded random ids were used")
        return samples.random_sequences(sizes[0], longest, avoid=pad), pad or 0
    strings = samples.read(text) if text is not None else samples.sentences()
    ids = [samples.tokenize(tokenizer, strings, longest) for tokenizer in tokenizers]
    if ids[0] != ids[-1]:
        raise ValueError("b: expected a tokenizer that reads the text as a's does; its tokens differ")
    if not ids[0]:
        raise ValueError("text: expected text that gives tokens, got none")
    return ids[0], pad or 0


def _run(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, pool: str | None) -> _Output:
    device = next(model.parameters()).device
    known = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in known else {}
    out = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        output_hidden_states=True,
        return_dict=True,
        **extra,
    )
    keep = mask.bool()

    def tokens(state: torch.Tensor) -> torch.Tensor:
        return state.to("cpu", torch.float64)[keep]

    states = list(getattr(out, "hidden_states", None) or [])
    hidden = [tokens(state) for state in states]
    name = next((name for name in OUTPUTS if getattr(out, name, None) is not None), "")
    if pool == "mean":
        last = out.last_hidden_state if name == "last_hidden_state" else states[-1] if states else None
        if last is None:
            raise ValueError(
                f"pool: expected a model that returns hidden states, {type(model).__name__} does not"
            )
        weight = keep.double().unsqueeze(-1)
        mean = (last.to("cpu", torch.float64) * weight).sum(1) / weight.sum(1)
        return _Output("mean-pooled embeddings", torch.nn.functional.normalize(mean, dim=-1), hidden)
    if not name:
        raise ValueError(
            f"expected a model with logits or last_hidden_state, {type(model).__name__} has neither"
        )
    rows = getattr(out, name)
    if rows.shape[:2] == ids.shape and rows.dim() == 3:
        return _Output(name, tokens(rows), hidden)
    return _Output(name, rows.to("cpu", torch.float64).flatten(1), hidden)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = SHORT.get(dtype, dtype) if isinstance(dtype, str) else _name(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join([*DTYPES, *SHORT])}, got {dtype!r}")
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Verb(types.ModuleType):
    """Makes ``gaugekit.verify(a, b)`` work although importing this module binds the name to the module."""

    __call__ = staticmethod(verify)


sys.modules[__name__].__class__ = _Verb
