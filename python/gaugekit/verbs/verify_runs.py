"""What ``verify`` runs: one model at a time, on the same inputs, its outputs kept on disk to hold the next against.

A model in float64 is large, so no two models need to be in memory at once: the outputs of a pass go into an unnamed
temporary file, in the order of the batches, and come back batch by batch.
"""

from __future__ import annotations

import bisect
import copy
import inspect
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gaugekit import models
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.text.batches import batches, padding, token_ids
from gaugekit.text.pooling import embeddings
from gaugekit.text.samples import random_sequences
from gaugekit.text.sentences import read, sentences
from gaugekit.verbs.wide_products import wide_products

# The first that a model gives is compared.
OUTPUTS = ("logits", "prediction_logits", "logits_per_image", "last_hidden_state")
# Where a model, or a tower of it, gives its hidden states; all are compared.
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
READS = ("input_ids", "pixel_values", "input_ids and pixel_values", "input_features")
TOKENS = 2048  # as many are always run, where the text holds them
SMALL = 30_000_000  # parameters up to which the whole default text is cheap
LOGITS = 1 << 23  # numbers a batch of logits may hold: 64 MB in float64
IMAGES = 16  # seeded random images, or spectrograms, for a model that reads nothing else
BESIDE = 4  # images beside each batch of texts
SOUNDS = 2  # spectrograms where a decoder reads tokens beside: each costs as much as hundreds of sentences


@dataclass
class Output:
    """What one model gave for one batch, on the CPU: output rows [N, width], hidden states [N, D] each."""

    name: str
    rows: torch.Tensor
    hidden: list[torch.Tensor]


@dataclass
class Batch:
    """Named inputs of a model, and which positions count (None: all)."""

    inputs: dict[str, torch.Tensor]
    keep: torch.Tensor | None

    @property
    def size(self) -> int:
        """Tokens that count, or images."""
        return int(self.keep.sum()) if self.keep is not None else len(next(iter(self.inputs.values())))


class Kept:
    """The outputs of one pass over all batches, in an unnamed temporary file, read back in the same order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gaugekit-verify-")  # noqa: SIM115
        self._layouts: list[tuple[str, list[tuple[torch.Size, torch.dtype]]]] = []

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, output: Output) -> None:
        """Keeps the outputs of the next batch; ValueError where the temporary folder has no room for them."""
        tensors = [output.rows, *output.hidden]
        self._layouts.append((output.name, [(tensor.shape, tensor.dtype) for tensor in tensors]))
        try:
            for tensor in tensors:
                self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise ValueError(
                f"expected room for the outputs of one pass in the temporary folder {tempfile.gettempdir()!r}: {error}"
            ) from error

    def __iter__(self) -> Iterator[Output]:
        start = 0
        for name, layouts in self._layouts:
            self._file.seek(start)  # another reader may be at another batch
            rows, *hidden = (self._read(shape, dtype) for shape, dtype in layouts)
            start = self._file.tell()
            yield Output(name, rows, hidden)

    def _read(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        content = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return (
            torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
        )


class Subject:
    """A directory or a live model under one roof: its config, its tokenizer, itself in any dtype."""

    def __init__(self, source: str | Path | torch.nn.Module, argument: str):
        from gaugekit.hf import loading

        self.argument = argument
        self.one_by_one = False  # whether float64 takes experts one by one, for want of grouped products
        self.live = source if isinstance(source, torch.nn.Module) else None
        self.path = None
        if self.live is None:
            self.path = loading.directory(source, argument)
            self.config = loading.config(self.path)
        elif hasattr(source, "config"):
            self.config = source.config
            self.path = loading.home(source)
        else:
            raise ValueError(
                f"{argument}: expected a model directory or a live transformers model, got {type(source).__name__}"
            )

    @property
    def kind(self) -> type:
        """The class of the model."""
        from gaugekit.hf import loading

        return loading.architecture(self.path) if self.live is None else type(self.live)

    @property
    def reads(self) -> str:
        """What the model reads: the name of its main input, or of both where it has two towers."""
        from gaugekit.hf import loading

        main = loading.reads(self.kind)
        both = main == "input_ids" and models.two_towers(self.config.to_dict())
        return "input_ids and pixel_values" if both else main

    @property
    def ends(self) -> bool:
        """Whether it may look for the end of a text by the token that stands there."""
        return self.decodes or self.reads == "input_ids and pixel_values"

    @property
    def decodes(self) -> bool:
        """Whether it has an encoder and a decoder, which reads token ids of its own."""
        return "decoder_input_ids" in inspect.signature(self.kind.forward).parameters

    def parameters(self) -> int:
        """How many numbers the model has."""
        if self.live is not None:
            return sum(parameter.numel() for parameter in self.live.parameters())
        checkpoint = Checkpoint(self.path)
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())

    def dtype(self, loaded: torch.nn.Module) -> torch.dtype:
        """The dtype most of the model's numbers are stored in; those of a directory are the ones ``loaded`` has."""
        numbers: Counter[torch.dtype] = Counter()
        if self.live is None:
            checkpoint, prefix = Checkpoint(self.path), f"{loaded.base_model_prefix}."
            own = set(loaded.state_dict())
            own |= {prefix + name for name in own} | {name.removeprefix(prefix) for name in own}
            names = [name for name in checkpoint.names() if checkpoint.dtype(name).is_floating_point]
            # Some files name tensors otherwise than the model does; then there is nothing to tell them by.
            for name in [name for name in names if name in own] or names:
                numbers[checkpoint.dtype(name)] += math.prod(checkpoint.shape(name))
        else:
            for parameter in self.live.parameters():
                if parameter.is_floating_point():
                    numbers[parameter.dtype] += parameter.numel()
        if not numbers:
            raise ValueError(f"{self.argument}: expected a model with floating-point parameters, found none")
        return numbers.most_common(1)[0][0]

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        from gaugekit.hf import loading

        if self.one_by_one and dtype == torch.float64:
            loaded = copy.deepcopy(self.live) if self.live is not None else loading.model(self.path, dtype)
            loaded = loaded.to(dtype).eval()
            loaded.set_experts_implementation("eager")
            return loaded
        if self.live is None:
            return loading.model(self.path, dtype)
        state = [*self.live.parameters(), *self.live.buffers()]
        ready = all(tensor.dtype == dtype for tensor in state if tensor.is_floating_point())
        if ready and not any(module.training for module in self.live.modules()):
            return self.live
        return copy.deepcopy(self.live).to(dtype).eval()

    def reference(
        self, runs: Callable[[torch.nn.Module], object]
    ) -> tuple[torch.nn.Module, torch.dtype, list[str]]:
        """(model, dtype, notes): the model in the highest dtype in which ``runs(model)`` does not fail.

        Grouped products of experts exist in lower dtypes only; float64 then takes the experts one by one.
        """
        model = self.model(torch.float64)
        try:
            runs(model)
            return model, torch.float64, []
        except (RuntimeError, NotImplementedError) as error:
            failure = error.with_traceback(None)  # it would hold on to the model
        name = type(model).__name__
        del model
        self.one_by_one = True
        try:
            model = self.model(torch.float64)
            runs(model)
            return model, torch.float64, [f"reference: the experts of {name} run one by one in float64"]
        except (RuntimeError, NotImplementedError, ValueError, AttributeError):
            self.one_by_one = False  # it was something else
        model = self.model(torch.float32)
        try:
            runs(model)
        except (RuntimeError, NotImplementedError):
            raise failure from None
        reason = str(failure).strip().splitlines()[0]
        return model, torch.float32, [f"reference: {name} runs in float32 at most ({reason})"]

    def tokenizer(self) -> Any | None:
        from gaugekit.hf import loading

        return loading.tokenizer(self.path) if self.path is not None else None


def sequences(
    original: Subject, result: Subject, text: str | Path | list[str] | None, notes: list[str]
) -> tuple[list[list[int]], int]:
    """Token ids to run both models on, and the id that pads them; of the default text as many as are cheap."""
    from gaugekit.hf import loading

    sizes = [getattr(subject.config.get_text_config(), "vocab_size", None) for subject in (original, result)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"b: expected the vocabulary of a, {sizes[0]} tokens, got {sizes[1]}")
    longest = min(loading.positions(subject.config) for subject in (original, result))
    tokenizers = [t for subject in (original, result) if (t := subject.tokenizer()) is not None]
    if not tokenizers:
        if text is not None:
            raise ValueError("text: expected a tokenizer beside the model to read text with, found none")
        if not sizes[0]:
            raise ValueError("a: expected a vocab_size in its config, found none")
        notes.append("text: no tokenizer was found, so seeded random ids were used")
        avoid = getattr(original.config, "pad_token_id", None)
        ids = random_sequences(sizes[0], longest, avoid=avoid)
        return (_ended(ids, original.config) if original.ends else ids), padding(original.config)
    strings = read(text) if text is not None else sentences()
    ids = [token_ids(tokenizer, strings, longest) for tokenizer in tokenizers]
    if ids[0] != ids[-1]:
        raise ValueError("b: expected a tokenizer that reads the text as a's does; its tokens differ")
    cheap = ids[0] if text is not None else affordable(ids[0], original.parameters())
    return cheap, padding(original.config)


def _ended(ids: list[list[int]], config: Any) -> list[list[int]]:
    """The sequences with the token that ends a text as their last and nowhere else."""
    text = config.get_text_config()
    end, pad = text.eos_token_id, text.pad_token_id
    if not isinstance(end, int):
        return ids
    other = next(token for token in range(3) if token not in (end, pad))
    return [[*(other if token == end else token for token in sequence[:-1]), end] for sequence in ids]


def affordable(ids: list[list[int]], parameters: int) -> list[list[int]]:
    """All sequences for a model of up to 30 M ``parameters``, else the first that together have 2,048 tokens."""
    if parameters <= SMALL:
        return ids
    tokens = list(itertools.accumulate(map(len, ids)))
    return ids[: bisect.bisect_left(tokens, TOKENS) + 1]


def text_batches(ids: list[list[int]], pad: int, batch_size: int, model: torch.nn.Module) -> list[Batch]:
    """The sequences in batches of ``batch_size``, or of fewer where their logits would be large."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1
    tokens = None if head is None else LOGITS // vocabulary
    return [
        Batch({"input_ids": rows, "attention_mask": mask}, mask.bool())
        for rows, mask in batches(ids, batch_size, pad, tokens)
    ]


def make_batches(
    subject: Subject, ids: list[list[int]], pad: int, batch_size: int, model: torch.nn.Module
) -> list[Batch]:
    """What both models run on: ``ids`` in batches, or the pixels or sounds that ``subject`` reads, or several of them.

    A decoder beside an encoder reads the text the encoder reads, a token late, or beside sounds random ids.
    """
    config, reads = subject.config, subject.reads
    if reads == "pixel_values":
        return pixel_batches(config, batch_size)
    if reads == "input_features":
        return sound_batches(config, min(batch_size, SOUNDS), subject.decodes)
    texts = text_batches(ids, pad, batch_size, model)
    if subject.decodes:
        for batch in texts:
            batch.inputs |= _decoded(batch.inputs["input_ids"], batch.inputs["attention_mask"], config)
    if reads == "input_ids and pixel_values":
        images = pixel_batches(config, BESIDE)
        for number, batch in enumerate(texts):
            batch.inputs |= images[number % len(images)].inputs
    return texts


def _decoded(ids: torch.Tensor, mask: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """``ids`` [B, T] as a decoder is taught with them: a start, then all but the last."""
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
    start = next((token for token in starts if isinstance(token, int)), padding(config))
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    return {"decoder_input_ids": shifted, "decoder_attention_mask": mask}


def sound_batches(config: Any, batch_size: int, decodes: bool) -> list[Batch]:
    """Seeded random spectrograms of the size the config names, each with random ids where a decoder reads them."""
    bins, length = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(length, int):
        raise ValueError(
            "a: expected num_mel_bins and max_source_positions in the config of a model that reads spectrograms, "
            f"got {bins!r} and {length!r}"
        )
    generator = torch.Generator().manual_seed(0)
    count = SOUNDS if decodes else IMAGES
    sounds = torch.randn(count, bins, 2 * length, generator=generator, dtype=torch.float64)
    parts = sounds.split(batch_size)
    if not decodes:
        return [Batch({"input_features": part}, None) for part in parts]
    from gaugekit.hf import loading

    pad = padding(config)
    ids = random_sequences(config.vocab_size, loading.positions(config), count=count, avoid=pad)
    made = zip(parts, batches(ids, batch_size, pad), strict=True)
    return [
        Batch({"input_features": part} | _decoded(rows, mask, config), mask.bool())
        for part, (rows, mask) in made
    ]


def pixel_batches(config: Any, batch_size: int) -> list[Batch]:
    """Seeded random images of the size the config names, or that of its tower for images."""
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(
            f"a: expected an image_size in the config of a model that reads pixels, got {size!r}"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, channels, height, width, generator=generator, dtype=torch.float64)
    return [Batch({"pixel_values": part}, None) for part in images.split(min(batch_size, 4))]


@torch.no_grad()
def run(model: torch.nn.Module, batch: Batch, pool: str | None) -> Output:
    """The outputs of ``model`` for one batch; ValueError where it has none that can be compared."""
    parameter = next(model.parameters())
    known = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in known else {}
    inputs = {name: tensor.to(parameter.device) for name, tensor in batch.inputs.items()}
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with wide_products(parameter.dtype):
        out = model(**inputs, output_hidden_states=True, return_dict=True, **extra)
    keep = batch.keep

    def tokens(state: torch.Tensor) -> torch.Tensor:
        state = state.to("cpu")
        return state[keep] if keep is not None and state.shape[:2] == keep.shape else state.flatten(0, -2)

    states = list(_states(out, "input_features" in batch.inputs))
    hidden = [tokens(state) if of_text else state.to("cpu").flatten(0, -2) for state, of_text in states]
    name = next((name for name in OUTPUTS if getattr(out, name, None) is not None), "")
    if pool == "mean":
        last = out.last_hidden_state if name == "last_hidden_state" else states[-1][0] if states else None
        if last is None:
            raise ValueError(
                f"pool: expected a model that returns hidden states, {type(model).__name__} does not"
            )
        return Output("mean-pooled embeddings", embeddings(last, keep), hidden)
    if not name:
        raise ValueError(
            f"expected a model with logits or last_hidden_state, {type(model).__name__} has neither"
        )
    rows = getattr(out, name)
    by_token = rows.dim() == 3 and (keep is None or rows.shape[:2] == keep.shape)
    return Output(name, tokens(rows) if by_token else rows.to("cpu").flatten(1), hidden)


def _states(out: Any, sound: bool) -> Iterator[tuple[torch.Tensor, bool]]:
    """The hidden states of a model, part by part, each with whether its tokens are those of the text."""
    for part in (out, getattr(out, "text_model_output", None), getattr(out, "vision_model_output", None)):
        of_text = part is not getattr(out, "vision_model_output", None)
        for name in STATES:
            for state in getattr(part, name, None) or ():
                yield state, of_text and not (sound and name == "encoder_hidden_states")
