"""The proof: how far a rewritten model stands from its original, beside the noise of the arithmetic itself."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gaugekit.checkpoint.dtypes import floating, name_of
from gaugekit.files.durable import digest_of
from gaugekit.report import Report
from gaugekit.rewrite import certificate as certificates
from gaugekit.text.sentences import read
from gaugekit.verbs import wording
from gaugekit.verbs.verify_runs import (
    READS,
    Batch,
    Kept,
    Output,
    Subject,
    make_batches,
    run,
    sequences,
)

# An exact rewrite may err as the original does, and a little more: its factors are rounded once again.
NOISE_FACTOR = {torch.float32: 1.5, torch.float16: 1.2, torch.bfloat16: 1.2}
FLOAT64_BOUND = 1e-12
DRIFT = 0.5  # in units of the noise: how far two runs of the same verification may lie apart
SAME_BASIS = 0.1  # a relative error of hidden states from which on their basis is another
BLOCK = 1 << 21  # numbers of a batch's outputs that are held in float64 at a time


def verify(
    a: str | Path | torch.nn.Module,
    b: str | Path | torch.nn.Module,
    *,
    text: str | Path | list[str] | None = None,
    dtype: str | torch.dtype | None = None,
    pool: str | None = None,
    batch_size: int = 32,
    certificate: str | Path | None = None,
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
    exact rewrite: relative_error ≤ 1.5 noise in float32, ≤ 1.2 noise in bfloat16 and float16, ≤ 1e-12 in float64.
    NaN or infinity at a position that is not padding, in an output or a hidden state of either model, is never ok:
    ``findings`` names the model, the dtype and the place, and what cannot be computed is None.

    ``a`` and ``b`` are model directories or live transformers models. A live model is never altered: where it has
    another dtype or is in training mode, a copy is used. Memory: one model at a time (``a`` in float64 is the largest)
    and the outputs of one batch; those of a pass wait in a temporary file. ``dtype`` is a name or a torch dtype; the
    default is the one most numbers of ``a`` are stored in. A model that does not run in float64 is held against the
    highest dtype it runs in, ``reference_dtype``.

    ``text`` is a UTF-8 file (or a list of strings), read whole; the default is 500 English sentences where there is a
    tokenizer, of which a model above 30 M parameters reads the first that have 2,048 ``tokens``; else 64 sequences
    of seeded random ids, or 16 seeded random images for a model that reads pixels. A decoder beside an encoder reads
    the same text, a token late; a model with two towers 4 images beside each batch of texts; one that reads sound, 16
    seeded random spectrograms, or 2 and random ids for its decoder. ``progress(done, total)`` counts tokens (or images)
    over all passes.

    ``certificate``: a new JSON file to write what was verified into (or a directory, usually ``b``, for a file
    ``gaugekit_verification.json``): digests of all tensors of both directories, the settings, the report with its
    errors by layer, the groups that ``convert`` removed, versions. Written where ``ok`` alone; else a note says so.
    ``check_certificate`` reads it. The report's ``hidden_states`` says whether those of ``b`` are those of ``a``
    ("same"), the stream was given another basis ("turned"), which logits do not show but a draft model sees, or the
    output is another as well ("other").

    Raises ValueError for a directory without config.json, weights or a known architecture, for models of different
    vocabularies or output shapes, and for text without a tokenizer; ImportError where transformers is absent.
    """
    if pool not in (None, "mean"):
        raise ValueError(f"pool: expected None or 'mean', got {pool!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
    target = None if certificate is None else certificates.check_free(certificate, {"a": a, "b": b})
    steps = [] if target is None else certificates.rewrites(Path(b))
    original, result = Subject(a, "a"), Subject(b, "b")
    working = floating(dtype) if dtype is not None else None
    notes: list[str] = []
    reads = _reads(original, result, text, pool)
    ids, pad = sequences(original, result, text, notes) if "input_ids" in reads else ([], 0)
    trials: list[Batch] = []

    def trial(model: torch.nn.Module) -> None:
        trials[:] = make_batches(original, ids, pad, batch_size, model)
        run(model, trials[0], pool)

    model, highest, more = original.reference(trial)
    notes += more
    result.one_by_one = original.one_by_one
    working = original.dtype(model) if working is None else working
    if working == torch.float64 != highest:
        working = highest
        notes.append(f"dtype: {name_of(highest)}, since {type(model).__name__} does not run in float64")
    passes = _Passes(trials, pool, 2 if working == highest else 3, progress)
    comparison = _Comparison(highest, working)
    with Kept() as reference, Kept() as plain:
        for output in passes.of(model):
            reference.add(output)
        del model
        if working == highest:
            comparison.original(reference, reference)
        else:
            comparison.original(reference, _keeping(passes.of(original.model(working)), plain))
        comparison.result(
            reference, reference if working == highest else plain, passes.of(result.model(working))
        )
    report = comparison.report(passes.tokens, notes)
    if target is not None and not report["ok"]:
        report.notes.append("certificate: none was written, since the result is not the original")
    elif target is not None:
        strings = None if text is None else read(text)
        asked = {"dtype": name_of(working), "pool": pool, "batch_size": batch_size, "text": strings}
        certificates.record(target, {"a": Path(a), "b": Path(b)}, asked, report.fields, steps)
        report.notes.append(f"certificate: written to {target}")
    return wording.verified(report, NOISE_FACTOR.get(working), a, b)


def check_certificate(
    certificate: str | Path,
    a: str | Path | None = None,
    *,
    text: str | Path | list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Whether what ``certificate`` says still holds: the digests are computed anew, and the errors by running both
    models as they were run then.

    Returns the Report of ``verify`` of now, with ``certified`` {noise, relative_error} of then (None in a certificate
    of ``convert``, which has none); ``ok`` asks that then and now are both ok, and that error and noise of now lie
    within half the noise of now of those of then.

    certificate: a file that ``verify`` wrote, or a directory with one, or with one that ``convert`` left
    a: the original, where it stands elsewhere than then; a certificate of ``convert`` does not say where it stood
    text: the text of then, where it was not the default
    progress: told (tokens done, in all)

    Raises ValueError where a tensor, a config or a file is another than the one certified, naming it; where a model or
    the text is missing or another; and for what is no certificate.
    """
    proof = certificates.read(certificate)
    places = {"a": proof.model("a", a), "b": proof.model("b", None)}
    for role, path in places.items():
        proof.refuse_changes(role, path)
    settings = dict(proof.settings)
    digest = settings.pop("text", None)
    if (None if text is None else digest_of(read(text))) != digest and not proof.by_file:
        expected = "the default (None)" if digest is None else f"the one of SHA-256 {digest[:12]}…"
        raise ValueError(f"text: expected the text that was verified with, {expected}; got another")
    report = verify(places["a"], places["b"], text=text, progress=progress, **settings)
    then = {name: proof.errors.get(name) for name in ("noise", "relative_error")}
    report.fields["certified"] = None if proof.by_file else then
    if not proof.by_file:
        report.fields["ok"] = report["ok"] and proof.errors.get("ok") is True and _agrees(then, report)
    return wording.certified(report, proof.path, places["b"])


def _agrees(then: dict[str, float | None], report: Report) -> bool:
    """Whether error and noise of now are those of then, to what another machine or version may round otherwise; the
    noise of now is the unit, since that of then is what is held to it."""
    pairs = [(then[name], report[name]) for name in ("noise", "relative_error")]
    if not all(isinstance(value, int | float) for pair in pairs for value in pair):
        return False
    room = DRIFT * report["noise"] + FLOAT64_BOUND
    return all(abs(now - past) <= room for past, now in pairs)


def allowed(noise: float, dtype: torch.dtype) -> float:
    """The relative error an exact rewrite may have beside that ``noise``: 1.5 times it in float32, 1.2 times in
    bfloat16 and float16, and 1e-12 in float64."""
    return FLOAT64_BOUND if dtype == torch.float64 else NOISE_FACTOR[dtype] * noise


def _reads(original: Subject, result: Subject, text: object, pool: str | None) -> str:
    """What both models read, one of ``READS``; ValueError for anything else, and for text or a pool that do not fit."""
    reads = original.reads
    if reads not in READS:
        expected = "token ids, pixels or spectrograms"
        raise ValueError(f"a: expected a model that reads {expected}, got one that reads {reads}")
    if reads == "pixel_values" and original.decodes:
        raise ValueError("a: expected a model that reads pixels alone, got one with a decoder of text beside")
    if result.reads != reads:
        raise ValueError(f"b: expected a model that reads {reads}, as a does, got {result.reads}")
    if result.decodes != original.decodes:
        side = "with" if original.decodes else "without"
        raise ValueError(f"b: expected a model {side} a decoder beside its encoder, as a is")
    if "input_ids" not in reads and text is not None:
        what = "pixels" if reads == "pixel_values" else "spectrograms"
        raise ValueError(f"text: expected none, since the model reads {what}, not text")
    if pool is not None and (original.decodes or reads not in ("input_ids", "pixel_values")):
        raise ValueError("pool: expected None, since the model does not read one text alone, got 'mean'")
    return reads


def _keeping(outputs: Iterable[Output], kept: Kept) -> Iterator[Output]:
    for output in outputs:
        kept.add(output)
        yield output


class _Passes:
    """Runs one model after another over the same batches and tells how far they are."""

    def __init__(self, batches: list[Batch], pool: str | None, count: int, progress: Callable | None):
        self.batches, self.pool, self.progress = batches, pool, progress
        self.tokens = sum(batch.size for batch in batches)
        self.done, self.total = 0, count * self.tokens

    def of(self, model: torch.nn.Module) -> Iterator[Output]:
        """The outputs of ``model``, batch by batch; the model is let go with the last."""
        for batch in self.batches:
            output = run(model, batch, self.pool)
            self.done += batch.size
            if self.progress is not None:
                self.progress(self.done, self.total)
            yield output
        del model
        gc.collect()  # modules refer to each other in circles; the next model needs the room


class _Comparison:
    """Everything that is summed over the batches, and the verdict."""

    def __init__(self, highest: torch.dtype, working: torch.dtype):
        self.highest, self.working = highest, working
        self.name, self.output, self.layers, self.comparable = "", _Error(), [], True

    def original(self, reference: Kept, outputs: Iterable[Output]) -> None:
        """Holds the original's outputs in the working dtype against the reference."""
        for r, p in zip(reference, outputs, strict=True):
            self.name = r.name
            self.output.add_original(r.rows, p.rows)
            self.layers = self.layers or [_Error() for _ in r.hidden]
            for error, *hidden in zip(self.layers, r.hidden, p.hidden, strict=True):
                error.add_original(*hidden)

    def result(self, reference: Kept, plain: Kept, outputs: Iterable[Output]) -> None:
        """Holds the result's outputs against the reference, and against the original's."""
        for r, p, y in zip(reference, plain, outputs, strict=True):
            if y.name != r.name or y.rows.shape != r.rows.shape:
                raise ValueError(
                    f"b: expected {r.name} of shape {list(r.rows.shape)} as from a, got {y.name} {list(y.rows.shape)}"
                )
            self.output.add_result(r.rows, p.rows, y.rows)
            if [h.shape for h in y.hidden] != [h.shape for h in r.hidden]:
                self.comparable = False
                strays = _Error()
                for hidden in y.hidden:
                    strays.add_result(hidden, hidden, hidden)
                self.output.stray += strays.broken["y"]
                continue
            for error, *hidden in zip(self.layers, r.hidden, p.hidden, y.hidden, strict=True):
                error.add_result(*hidden)

    def report(self, tokens: int, notes: list[str]) -> Report:
        layers = self.layers if self.comparable else []
        if not layers:
            notes.append("layers: not compared, since hidden states are missing or differ in number or width")
        findings = self._findings()
        noise, relative_error = self.output.noise(), self.output.relative_error()
        finite = noise is not None and relative_error is not None
        fields = {
            "ok": finite and not findings and relative_error <= allowed(noise, self.working),
            "noise": noise,
            "relative_error": relative_error,
            "max_abs_error": self.output.max_abs if finite else None,
            "min_cosine": self.output.min_cosine if finite else None,
            "dtype": name_of(self.working),
            "reference_dtype": name_of(self.highest),
            "output": self.name,
            "rows": self.output.rows,
            "tokens": tokens,
            "findings": findings,
            "hidden_states": _basis([error.relative_error() for error in layers], relative_error),
            "layers": [
                {"layer": index, "noise": error.noise(), "relative_error": error.relative_error()}
                for index, error in enumerate(layers)
            ],
        }
        return Report("verify", fields, [*notes, *findings])

    def _findings(self) -> list[str]:
        """One sentence for each model and dtype that gave NaN or infinity, with the first place it did."""
        findings = []
        working = name_of(self.working)
        who = {"r": f"the original (a) in {name_of(self.highest)}", "p": f"the original (a) in {working}",
               "y": f"the result (b) in {working}"}  # fmt: skip
        for key, what in who.items():
            if key == "p" and self.working == self.highest:
                continue
            hidden = next((place for place, error in enumerate(self.layers) if error.broken[key]), None)
            output = self.output.broken[key]
            if output:
                findings.append(
                    f"{what} is not finite: NaN or infinity in {output:,} of {self.output.rows:,} rows of {self.name}"
                )
            if hidden is not None:
                rows = self.layers[hidden].broken[key]
                findings.append(
                    f"{what} is not finite: NaN or infinity in {rows:,} rows of hidden state {hidden}, the first such"
                )
        if self.output.stray:
            findings.append(
                f"{who['y']} is not finite: NaN or infinity in {self.output.stray:,} rows of hidden states"
            )
        zero = self.output.reference == 0 and max(self.output.of.values()) > 0
        if zero and not findings:
            findings.append(f"{who['r']} gives only zeros, beside which no relative error has a meaning")
        return findings


def _basis(errors: list[float | None], output: float | None) -> str | None:
    """ "same" where hidden states of both models agree, "turned" where the output alone does, "other" where neither
    does; None where nobody knows. ``errors`` of the hidden states, and of the ``output``."""
    if not errors or output is None or None in errors:
        return None
    if max(errors) < SAME_BASIS:
        return "same"
    return "turned" if output < SAME_BASIS else "other"


@dataclass
class _Error:
    """Running sums of the squared errors of ``p`` (the original) and ``y`` (the result) against ``r``, in float64."""

    reference: float = 0.0
    of: dict[str, float] = field(default_factory=lambda: {"p": 0.0, "y": 0.0})
    broken: dict[str, int] = field(default_factory=lambda: {"r": 0, "p": 0, "y": 0})
    stray: int = 0
    max_abs: float = 0.0
    min_cosine: float = 1.0
    rows: int = 0

    def add_original(self, r: torch.Tensor, p: torch.Tensor) -> None:
        self.rows += len(r)
        for reference, plain in _blocks(r, p):
            size, error = reference.square().sum().item(), (plain - reference).square().sum().item()
            self.reference += size
            self.of["p"] += error
            # A sum of squares is finite only where every number is, so rows are looked at one by one when it is not.
            self.broken["r"] += 0 if math.isfinite(size) else _broken(reference)
            self.broken["p"] += 0 if math.isfinite(error) else _broken(plain)

    def add_result(self, r: torch.Tensor, p: torch.Tensor, y: torch.Tensor) -> None:
        for reference, plain, result in _blocks(r, p, y):
            error = (result - reference).square().sum().item()
            self.of["y"] += error
            self.broken["y"] += 0 if math.isfinite(error) else _broken(result)
            self.max_abs = max(self.max_abs, (result - plain).abs().max().item())
            norms = result.norm(dim=-1) * plain.norm(dim=-1)
            same = (result == plain).all(-1).double()
            cosine = torch.where(norms > 0, (result * plain).sum(-1) / norms, same)
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


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of all ``tensors`` in float64, a block at a time: logits are too large to be held so at once."""
    rows = max(1, BLOCK // max(tensors[0].shape[-1], 1))
    for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        if parts[0].numel():
            yield tuple(part.double() for part in parts)


def _broken(rows: torch.Tensor) -> int:
    return int((~rows.isfinite()).any(-1).sum())
