"""Second moments of what flows into a model's layers, one layer in memory at a time, resumable after a kill.

Text becomes tokens; the model's own embedding runs up to its first block, where a catcher takes what the block would
have been given; then each block in turn gets its weights from the checkpoint, reads the hidden states of every batch
from a memory-mapped file and writes those of the next block. Hidden states, arguments and finished layers stand in a
work folder, so that a second call goes on at the layer in which the first was killed (the way of GPTQ, Frantar et al.
2022, section 4, made resumable). Memory: the embedding or one block, and one batch.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gaugekit import models
from gaugekit.calibration.moments import Moments, add, observe, watched
from gaugekit.checkpoint.config import stored_as
from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.checkpoint.writer import versions
from gaugekit.files.durable import identity, replacing, sync
from gaugekit.files.places import naming_file
from gaugekit.files.staging import workplace
from gaugekit.text.batches import batches as batches_of
from gaugekit.text.batches import padding, token_ids


def collect(
    checkpoint: Checkpoint | str | Path,
    text_file: str | Path | list[str],
    *,
    work_directory: str | Path | None = None,
    modules: Sequence[str] = ("q",),
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Moments]]:
    """``moments[layer][name]``: the Moments of the inputs of module ``name`` in each layer, over the real tokens.

    ``modules`` are parts of the attention ("q", "k", "v" read the attention's input, "o" the heads' outputs) or paths
    of modules inside a block ("mlp.c_fc"). ``text_file`` is a UTF-8 file, cut into sentences, or a list of strings,
    read by the tokenizer beside the weights; ``max_tokens`` stops after so many tokens. The model runs in ``dtype``,
    sums are float64. ``progress(done, total)`` counts batches, (layers + 1) times each.

    ``work_directory`` is a new or empty folder, which this job locks and marks as its own. A killed call is resumed by
    calling again with the same weights, text, arguments and versions, and a finished one returns what it found; without
    it a temporary folder is used. Disk: two copies of the hidden states.

    Raises ValueError for a checkpoint, text, module or work folder that does not fit, also one that holds another job's
    work or files that are not ours; OSError where the disk is too small.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    if not modules or isinstance(modules, str):
        raise ValueError(f"modules: expected names of modules, got {modules!r}")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    sequences, pad = _sequences(checkpoint, text_file, max_tokens)
    with contextlib.ExitStack() as stack:
        if work_directory is None:
            work_directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="gaugekit-statistics-"))
        batches = list(batches_of(sequences, batch_size, pad))
        which = _identity(checkpoint, sequences, list(modules), batch_size, dtype)
        state = stack.enter_context(contextlib.closing(Work(work_directory, which)))
        run = Pass(checkpoint, dtype, list(modules))
        total = (len(run.blocks) + 1) * len(batches)
        done = (state.layer + 1) * len(batches) if state.embedded else 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        if not state.embedded:
            run.embed(batches, state, advance)
            state.record(layer=0)
        for layer in range(state.layer, len(run.blocks)):
            moments = run.layer(layer, batches, state, advance)
            with replacing(state.results_path(layer)) as file:
                torch.save({name: vars(sums) for name, sums in moments.items()}, file)
            state.record(layer=layer + 1)
        state.hidden_path(len(run.blocks)).unlink(missing_ok=True)
        files = [state.results_path(layer) for layer in range(len(run.blocks))]
        read = [torch.load(file, weights_only=True) for file in files]
    return [{name: Moments(**values) for name, values in layer.items()} for layer in read]


class Work:
    """The work folder: how far the pass is, the hidden states before layer ``layer``, the arguments of each batch."""

    def __init__(self, folder: str | Path, identity: dict):
        start = {"layer": 0, "width": 0, "embedded": False}
        self._staged = workplace(folder, identity, start, self._sound)
        self.work = self._staged.folder
        self.layer, self.embedded = self._staged.state["layer"], self._staged.state["embedded"]
        self.width = self._staged.state["width"]
        (self.work / "arguments").mkdir(exist_ok=True)

    @staticmethod
    def _sound(folder: Path, state: dict) -> bool:
        return all((folder / f"layer_{layer}.pt").is_file() for layer in range(state["layer"]))

    def record(self, layer: int) -> None:
        """Makes ``layer`` the one to go on with; a kill at any moment leaves either the old record or the new."""
        self._staged.state |= {"layer": layer, "width": self.width, "embedded": True}
        self._staged.save()
        self.layer, self.embedded = layer, True
        if layer:
            self.hidden_path(layer - 1).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets another process at the folder."""
        self._staged.close()

    def results_path(self, layer: int) -> Path:
        return self.work / f"layer_{layer}.pt"

    def hidden_path(self, layer: int) -> Path:
        return self.work / f"hidden_{layer}.bin"

    def hidden(self, layer: int, batches: list, dtype: torch.dtype) -> list[torch.Tensor]:
        """The hidden states that enter ``layer``, [B, T, D] a batch, all views of one mapped file."""
        shapes = [(*ids.shape, self.width) for ids, _ in batches]
        sizes = [math.prod(shape) for shape in shapes]
        path, size = self.hidden_path(layer), sum(sizes) * dtype.itemsize
        free = shutil.disk_usage(self.work).free + (path.stat().st_size if path.exists() else 0)
        if free < size:
            message = f"{size:,} bytes are needed for hidden states, {free:,} are free"
            raise OSError(errno.ENOSPC, message, str(self.work))
        if hasattr(os, "posix_fallocate"):
            # A mapped file that finds no room when it is written to ends the process; here it is an error.
            with naming_file(path), path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        mapped = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=dtype)
        return [part.view(shape) for part, shape in zip(mapped.split(sizes), shapes, strict=True)]

    def sync(self, layer: int) -> None:
        """Puts the mapped file of ``layer`` on the disk before a record says it is there."""
        sync(self.hidden_path(layer))

    def arguments(self, index: int) -> Path:
        return self.work / "arguments" / f"{index}.pt"


class Caught(Exception):
    """Ends a run early: raised by a hook, with what it caught."""


class Pass:
    """A model whose parameters have no memory, except those of the module at work."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, modules: list[str]):
        from gaugekit.hf import loading

        self.checkpoint, self.dtype = checkpoint, dtype
        layers = models.Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
        if (reason := layers.family.unstreamed) is not None:
            raise ValueError(
                f"checkpoint: expected blocks that can be run one by one over a text, but {reason}"
            )
        self.model = loading.skeleton(checkpoint.path, dtype)
        self.blocks = layers.family.blocks(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        self.path = {module: f"{name}." if name else "" for module, name in names.items()}
        # The file may name the base model's tensors with or without the prefix the live model has.
        self.prefix = (layers.family.prefix(name for name, _ in self.model.named_parameters()), layers.prefix)
        self.family = layers.family
        self.watched = watched(self.model, self.blocks, layers.family, modules)
        self.real = torch.empty(0, dtype=torch.bool)

    def load(self, module: torch.nn.Module, recurse: bool = True) -> None:
        """Gives the parameters of ``module`` their stored numbers, in the pass's dtype."""
        for owner in module.modules() if recurse else [module]:
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    name = self.path[owner] + leaf
                    stored = self.prefix[1] + name.removeprefix(self.prefix[0])
                    data = self.checkpoint.read(stored).to(self.dtype)
                    if data.shape != parameter.shape:
                        expected = list(parameter.shape)
                        raise ValueError(f"checkpoint: {stored}: expected {expected}, got {list(data.shape)}")
                    owner._parameters[leaf] = torch.nn.Parameter(data, requires_grad=False)

    def drop(self, module: torch.nn.Module) -> None:
        """Takes the memory of the parameters of ``module`` back."""
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[leaf] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    def embed(self, batches: list, state: Work, advance: Callable[[], None]) -> None:
        """Runs the model up to its first block; what that block is given goes to the work folder."""

        def catch(module, arguments, named):
            raise Caught(arguments, named)

        def just_in_time(module, arguments):
            self.load(module, recurse=False)

        inside = {module for block in self.blocks for module in block.modules()}
        hooks = [self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)]
        hooks += [
            module.register_forward_pre_hook(just_in_time)
            for module in self.model.modules()
            if module not in inside
        ]
        hidden: list[torch.Tensor] = []
        try:
            for index, (ids, mask) in enumerate(batches):
                try:
                    with torch.no_grad():
                        self.model(input_ids=ids, attention_mask=mask, use_cache=False)
                except Caught as caught:
                    arguments, named = caught.args
                first, *rest = arguments if arguments else (named.pop("hidden_states"),)
                if not hidden:
                    state.width = first.shape[-1]
                    hidden = state.hidden(0, batches, self.dtype)
                hidden[index].copy_(first)
                with replacing(state.arguments(index)) as file:
                    torch.save((rest, named), file)
                advance()
        finally:
            for hook in hooks:
                hook.remove()
            self.drop(self.model)
        state.sync(0)

    def layer(
        self, layer: int, batches: list, state: Work, advance: Callable[[], None]
    ) -> dict[str, Moments]:
        """Runs one block over all batches, summing the moments of the modules watched in it."""
        moments: dict[str, Moments] = {}

        def watch(name: str):
            def hook(module, arguments):
                x = arguments[0]
                if x.shape[:2] != self.real.shape:
                    raise ValueError(
                        f"modules: expected {name!r} to take [B, T, D] = {list(self.real.shape)} tokens, "
                        f"got {list(x.shape)}"
                    )
                add(moments, name, x[self.real])

            return hook

        block = self.blocks[layer]
        self.load(block)
        hooks = [
            module.register_forward_pre_hook(watch(name)) for name, module in self.watched[layer].items()
        ]
        try:
            self.through(layer, batches, state, advance)
        finally:
            for hook in hooks:
                hook.remove()
            self.drop(block)
        return moments

    @torch.no_grad()
    def through(
        self, layer: int, batches: list, state: Work, advance: Callable[[], None], keep: bool = True
    ) -> None:
        """Runs one block, whose weights are loaded, over all batches; ``keep`` writes what it answers for the next one.

        Hooks find the real tokens of the batch at work in ``real`` [B, T]; one that raises ``Caught`` ends the batch.
        """
        before = state.hidden(layer, batches, self.dtype)
        after = state.hidden(layer + 1, batches, self.dtype) if keep else None
        for index, (_, mask) in enumerate(batches):
            rest, named = torch.load(state.arguments(index), weights_only=True)
            self.real = mask.bool()
            with contextlib.suppress(Caught):
                out = self.blocks[layer](before[index].clone(), *rest, **named)
                if after is not None:
                    after[index].copy_(out[0] if isinstance(out, tuple) else out)
            advance()
        if keep:
            state.sync(layer + 1)


def _sequences(checkpoint: Checkpoint, text, max_tokens: int | None) -> tuple[list[list[int]], int]:
    """The token ids of the text, at most ``max_tokens`` of them, and the id that pads."""
    from gaugekit.hf import loading

    if stored_as(checkpoint.config) is not None:
        raise ValueError("checkpoint: expected dense weights, got a compact form; convert it with --dense")
    tokenizer = loading.tokenizer(checkpoint.path)
    if tokenizer is None:
        raise ValueError(f"checkpoint: expected a tokenizer in {str(checkpoint.path)!r}, found none")
    config = loading.config(checkpoint.path)
    longest = loading.positions(config)
    sequences = token_ids(tokenizer, text, longest, most=max_tokens, argument="text_file")
    _check_kinds(config, max(map(len, sequences), default=0))
    return sequences, padding(config)


def _check_kinds(config, longest: int) -> None:
    """ValueError where layers of several kinds are told different things of the ``longest`` sequence: every block is
    given what the first was given.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) < 2:
        return
    window = getattr(config, "sliding_window", None) or longest
    if longest > window or kinds & set(getattr(config, "rope_parameters", None) or ()):
        what = "windows" if longest > window else "rotary positions"
        raise ValueError(
            f"checkpoint: expected layers that see a text of {longest} tokens alike, got some with {what} of their "
            "own; load the model and use gaugekit.rank.truncate(model, text)"
        )


def _identity(
    checkpoint: Checkpoint, sequences, modules: list[str], batch_size: int, dtype: torch.dtype
) -> dict:
    """What a work folder belongs to: the same weights, tokens and arguments, or it is not resumed."""
    return identity(
        "statistics",
        versions("transformers"),
        weights={"checkpoint": checkpoint.sha256()},
        text={"tokens": sequences},
        options={"modules": modules, "batch_size": batch_size, "dtype": str(dtype)},
    )


__all__ = ["Moments", "collect", "observe"]
