"""Distils back what an inexact rewrite lost: the student is trained towards the teacher's hidden states, label-free."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaugekit.checkpoint.reader import INDEX, Checkpoint
from gaugekit.checkpoint.writer import CERTIFICATE, SCRATCH, VERIFICATION, safetensors_package, versions
from gaugekit.files.durable import copy, identity, sync_files
from gaugekit.files.places import check_space, listing
from gaugekit.files.staging import OWN, Staging, check_target, free_bytes
from gaugekit.report import Report
from gaugekit.text.batches import tokens
from gaugekit.text.sentences import read
from gaugekit.verbs import wording
from gaugekit.verbs.heal_runs import Forecasts, HiddenStates, is_sliced
from gaugekit.verbs.heal_state import State, digest

KEPT = {".json", ".txt", ".model", ".md"}  # what stands beside weights: tokenizer, pooling, card
WARM_UP = 0.1  # of all steps; afterwards the rate falls to zero along a cosine


def heal(
    student: nn.Module,
    teacher: nn.Module,
    text: str | Path | list[str],
    *,
    parameters: Sequence[str] | None = None,
    steps: int = 400,
    layer_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    seed: int = 0,
    work_directory: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Trains ``student`` in place towards ``teacher``, which it was rewritten from; returns the curve.

    Two stages, each with AdamW (no weight decay), a warm-up and a cosine to zero, gradients clipped to norm 1:

    1. ``layer_steps`` (default: a quarter of ``steps``) layer by layer: every block of the student is given what the
       teacher's block was given and matches what that returned, min Σ_l ‖y_l − y_l*‖² / ‖y_l* − mean y_l*‖², so
       that an error in one layer teaches no other;
    2. ``steps`` end to end: the same sum over the hidden states of the student's own run, the last counted as much as
       all others together.

    A sliced student (``gaugekit.slicing``) holds its hidden states in bases of its own. It has stage 2 alone, towards
    what the teacher foretells: min KL(p_teacher ‖ p_student), nats a token, both causal language models.

    Tokens that pad count for nothing. A truncation by calibration text is already the closed form of the scores' own
    matching (``rank.spectra``), so nothing is left for it to do here; plain truncation is made up for by stage 1.

    ``parameters`` are patterns of parameter names ("*query*", "encoder.layer.0.*"); by default the weights and biases
    of queries and keys, or all where none is found; of a sliced student all but its embeddings. ``learning_rate`` is
    the highest, by default 1e-3, of a sliced student 1e-4. A pair of channels that is zero in queries and keys alike
    stays zero: neither gets a gradient. ``text`` is a UTF-8 file or a list of strings; every eighth sentence, at most
    256 in all (of a sliced student 48), is held out to draw the curve. ``work_directory`` is a new or empty folder,
    which is locked and marked as this job's: the state goes there eight times a stage, and a second call goes on from
    it, given the same weights of student (as it was before the first step) and teacher, text, arguments and versions.
    Deterministic for a seed, resumed or not.

    Returns a Report: ``parameters`` trained, ``steps``, ``curve`` [{stage, step, loss (held-out), mean_cosine,
    min_cosine (of mean-pooled embeddings, held-out)}], ``mean_cosine_before``, ``mean_cosine_after``; of a sliced
    student ``curve`` [{stage, step, loss, agreement (share of tokens of which both hold the same most likely)}],
    ``divergence_before``, ``divergence_after``. Raises ValueError for models of different blocks, patterns that match
    nothing, text that cannot be read, and arguments that do not fit, and for a ``work_directory`` of another job, or
    that holds files which are not ours.
    """
    kind = Forecasts if is_sliced(student) else HiddenStates
    layer_steps = kind.layer_steps(steps) if layer_steps is None else layer_steps
    learning_rate = kind.learning_rate if learning_rate is None else learning_rate
    _check_counts(steps, layer_steps, batch_size, kind)
    held_out, strings = _parted(read(text), kind.held_out)
    run = kind(student, teacher, parameters)
    held = [(batch, run.goals(batch)) for batch in tokens(teacher, held_out, run.together)]
    batches = tokens(teacher, strings, batch_size)
    options = {
        "parameters": sorted(run.trained),
        "steps": steps,
        "layer_steps": layer_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    which = identity(
        "heal",
        versions("transformers"),
        weights={"student": digest(student), "teacher": digest(teacher)},
        text={
            "text": [strings, held_out],
            "tokens": [b["input_ids"].tolist() for b in (*batches, *(h for h, _ in held))],
        },
        options=options,
    )
    state = State(work_directory, which, run.trained)
    total = layer_steps + steps
    was = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    student.requires_grad_(False)
    for parameter in run.trained.values():
        parameter.requires_grad_(True)
    try:
        if not state.curve:
            state.curve.append({"stage": "before", "step": 0, **run.measure(held)})
        for stage, first, count in (("layers", 0, layer_steps), ("end to end", layer_steps, steps)):
            state.enter(first)
            while first <= state.step < first + count:
                order = torch.randperm(len(batches), generator=_generator(seed, state.step // len(batches)))
                run.learn(batches[order[state.step % len(batches)]], by_layer=stage == "layers")
                state.advance(_rate(state.step - first, count) * learning_rate)
                if progress is not None:
                    progress(state.step, total)
                if (state.step - first) % max(count // 8, 1) == 0 or state.step == first + count:
                    state.curve.append({"stage": stage, "step": state.step, **run.measure(held)})
                    state.save()
    finally:
        state.close()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(was[name])
            parameter.grad = None
    fields: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in run.trained.values()),
        "steps": total,
        **run.told(state.curve[0], state.curve[-1]),
        "curve": state.curve,
    }
    return wording.healed(Report("heal", fields), student, teacher)


def _check_counts(steps: int, layer_steps: int, batch_size: int, kind: type) -> None:
    for name, value, least in (
        ("steps", steps, 0),
        ("layer_steps", layer_steps, 0),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
    if layer_steps and kind is Forecasts:
        raise ValueError(
            f"layer_steps: expected 0, as a sliced student has bases of its own, got {layer_steps}"
        )


def _parted(strings: list[str], most: int) -> tuple[list[str], list[str]]:
    """(held out, to learn from): at most ``most`` sentences, evenly spread, are held out."""
    if len(strings) < 2:
        raise ValueError(f"text: expected at least 2 sentences, one to hold out; got {len(strings)}")
    every = max(8, math.ceil(len(strings) / most))
    return strings[::every], [string for index, string in enumerate(strings) if index % every]


def heal_directory(
    student: str | Path,
    teacher: str | Path,
    target: str | Path,
    text: str | Path | list[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Report:
    """Heals the model directory ``student`` into a new directory ``target``; ``options`` as ``heal`` takes them.

    Both models are in memory, in float32; the result is stored as the student was. The work happens in
    ``<target>.partial``, which is locked and marked as this job's: after a kill the same call, of the same weights,
    text, options and versions, goes on where it stopped. Raises ValueError as ``heal`` does, and for a target that is
    not empty or lies inside a source; OSError where the disk has no room for the result, before any work, or does not
    take what is written.
    """
    from gaugekit.hf import loading

    paths = [loading.directory(student, "student"), loading.directory(teacher, "teacher")]
    target = Path(target)
    for path in paths:
        check_target(path, target)
    dtype = loading.stored_dtype(paths[0])
    strings = read(text)
    weights = Checkpoint(paths[0])
    numbers = sum(math.prod(weights.shape(name)) for name in weights.names())
    check_space(target, numbers * dtype.itemsize, free_bytes(target))
    staged = Staging(target, _directory_identity(paths, strings, options), {"report": None})
    with staged.until_closed(ValueError):
        if not staged.published:
            staged.clean({SCRATCH} if staged.resumed else set())
            staged.save()
            live, original = (loading.model(path, torch.float32) for path in paths)
            work = staged.folder / SCRATCH
            report = heal(live, original, strings, work_directory=work, progress=progress, **options)
            _save(live.to(dtype), paths[0], staged.folder)
            shutil.rmtree(work)
            staged.state["report"] = report.fields
            staged.save()
        fields = staged.state["report"]
        staged.publish()
    return wording.healed(Report("heal", fields), student, teacher, target)


def _directory_identity(paths: list[Path], strings: list[str], options: dict[str, Any]) -> dict:
    weights = {
        role: Checkpoint(path).sha256() for role, path in zip(("student", "teacher"), paths, strict=True)
    }
    chosen = {name: str(value) for name, value in options.items()}
    return identity("heal", versions("transformers"), weights=weights, text={"text": strings}, options=chosen)


def _save(model: nn.Module, source: Path, folder: Path) -> None:
    """The model, and what stands beside the weights in ``source``, whole and on the disk.

    Not what speaks of the student's own weights: their index of shards and their certificates.
    """
    try:
        model.save_pretrained(folder)
    except safetensors_package().SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    for name in listing(source)[0]:
        kept = (
            Path(name).suffix in KEPT
            and not name.endswith((INDEX, CERTIFICATE, VERIFICATION))
            and name not in OWN
        )
        if kept and not (folder / name).exists():
            copy(source / name, folder / name)
    sync_files(folder)


def _rate(step: int, steps: int) -> float:
    """1 after the warm-up, 0 at the end."""
    warm = max(int(WARM_UP * steps), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
