"""What a model carries that nobody can observe, and how compressible the rest is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gaugekit.checkpoint.reader import Checkpoint
from gaugekit.models import AttentionView, Family, Layers, Live, left_alone
from gaugekit.nn import NonlocalRegularizer
from gaugekit.rank import head_ranks, head_values
from gaugekit.report import Report
from gaugekit.text.batches import batches, padding, token_ids
from gaugekit.text.sentences import sentences
from gaugekit.verbs import inspect_shapes, wording

SMOOTH = 0.9  # a token cosine from which on a model is said to over-smooth
SENTENCES = 150  # as many as settle the token cosine to two digits


def inspect(
    model: str | Path | torch.nn.Module | Mapping[str, Any],
    *,
    text: str | Path | list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Counts what cannot be observed in ``model`` (a directory, read layer by layer, or a live transformers model).

    Fields: ``parameters``, the floating-point numbers stored; ``unobservable`` {group: count, total}, how many of them
    could be fixed without anyone seeing (dimensions of the groups of ``gaugekit.symmetry``, from the shapes and the
    gains of norms); ``removable``, how many of those ``convert --gauge`` stops storing; ``permutation_bits``, log₂ of
    the orders in which heads and hidden units could stand; ``exponent_entropy_bits``, the entropy of the exponents of
    all weights rounded to bfloat16, of 8 bits stored; ``token_cosine``, the mean cosine between two tokens of a text in
    the model's output; and one entry of ``layers`` for each layer:

        singular_values   [H][K] of W_Q W_Kᵀ for each head, in descending order, float64 (thin QRs, then a small SVD)
        ranks             [H] how many of them exceed what rounding to the stored dtype explains (``rank.head_ranks``)
        effective_ranks   [H] exp of the entropy of σ/Σσ (Roy and Vetterli 2007); 0 for a head of zeros
        exponent_entropy_bits   of the weights of the block this layer stands in
        token_cosine      of the tokens that enter this layer, None without text and where it runs more than once
        energy            J/Σ‖v_i‖² of the layer's attention over its values, the mean over texts and heads: with
                          J = ½ Σ_ij A_ij ‖v_i − v_j‖² (``gaugekit.nonlocal_energy``); 0 where all values agree

    A model whose tokens come to a cosine of 0.9 is reported as over-smoothing, with the layer.

    ``text`` is a UTF-8 file or a list of strings; the default is 150 English sentences where the model has a tokenizer.
    A config alone (a dict, a .json file, a directory without weights) gives the counts, without a download: ``layers``
    is empty then, and what is read off weights None.

    ``progress(done, total)`` counts layers and batches of text. Raises ValueError for a family that is not known, for a
    model (or its config) that is already compact or stored in another way, and for text without a tokenizer.
    """
    if (config := inspect_shapes.config_of(model)) is not None:
        return inspect_shapes.inspect_config(config, model, text)
    layers, sizes, read = _opened(model)
    parameters = sum(math.prod(size) for size in sizes.values())
    notes: list[str] = []
    runs = _Text(model, layers.family, text, notes)
    total, done = len(layers) + len(runs), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    histogram = torch.zeros(256, dtype=torch.int64)
    rows, barred, outlines = [], [], []
    blocks: dict[str, torch.Tensor] = {}  # the exponents of each; two layers may stand in one
    seen: set[str] = set()
    for layer in range(len(layers)):
        view = layers.attention(layer)
        barred.append(view.barred)
        outlines.append(inspect_shapes.outline(view))
        block = layers.prefix + layers.family.block(layer) + "."
        if block not in blocks:
            inside = [name for name in sizes if name.startswith(block)]
            blocks[block] = sum(
                (_exponents(read(name)) for name in inside if len(sizes[name]) > 1),
                torch.zeros_like(histogram),
            )
            seen.update(inside)
            histogram += blocks[block]
        entropy = _entropy(blocks[block])
        rows.append({"layer": layer, **_spectra(view), "exponent_entropy_bits": entropy})
        advance()
    for name, size in sizes.items():
        if name not in seen and len(size) > 1:
            histogram += _exponents(read(name))
    cosines, energies = runs.look(len(layers) + 1, advance)
    for row, cosine, energy in zip(rows, cosines, energies, strict=False):
        row |= {"token_cosine": cosine, "energy": energy}
    notes += _smoothing(cosines)
    notes += [*left_alone(barred), *inspect_shapes.values_tied(layers.config)]
    streams = inspect_shapes.streams_of(layers, sizes, read, notes)
    fields = {
        "parameters": parameters,
        **inspect_shapes.hidden(outlines, streams),
        "exponent_entropy_bits": _entropy(histogram),
        "token_cosine": cosines[-1],
        "layers": rows,
    }
    notes.insert(0, inspect_shapes.meaning(fields, outlines))
    return wording.inspected(Report("inspect", fields, notes), model, SMOOTH)


def _opened(
    model: str | Path | torch.nn.Module,
) -> tuple[Layers, dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """(its layers, the shape of every tensor of floating-point numbers it stores, what reads one) of a model."""
    if isinstance(model, torch.nn.Module):
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
        return Live(model), {name: tuple(p.shape) for name, p in tensors.items()}, tensors.__getitem__
    checkpoint = Checkpoint(model)
    layers = Layers(checkpoint.config, checkpoint.names(), checkpoint.read)
    if (checkpoint.config.get("quantization_config") or {}).get(
        "modules", ...
    ):  # {}: plain, saved with NeuTRENO's λ
        inspect_shapes.refuse_stored(checkpoint.config)
    names = (name for name in checkpoint.names() if not layers.family.recomputed(name))
    sizes = {name: checkpoint.shape(name) for name in names if checkpoint.dtype(name).is_floating_point}
    return layers, sizes, checkpoint.read


def _spectra(view: AttentionView) -> dict[str, list]:
    """Singular values, numerical ranks and effective ranks of W_Q W_Kᵀ for each head."""
    values = head_values(view)
    share = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    effective = torch.where(values[:, 0] > 0, entropy.exp(), 0.0)
    return {
        "ranks": head_ranks(view, values),
        "effective_ranks": effective.tolist(),
        "singular_values": values.tolist(),
    }


def _exponents(tensor: torch.Tensor) -> torch.Tensor:
    """How often each of the 256 exponents occurs in ``tensor`` rounded to bfloat16."""
    bits = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
    return torch.bincount(((bits >> 7) & 0xFF).flatten().int(), minlength=256)


def _entropy(counts: torch.Tensor) -> float:
    """H = −Σ p log₂ p in bits; 0 where nothing was counted."""
    p = counts.double() / max(int(counts.sum()), 1)
    return -torch.special.xlogy(p, p).sum().item() / math.log(2) + 0.0


def _smoothing(cosines: list[float | None]) -> list[str]:
    """What to say where tokens have become nearly parallel: the first such layer."""
    for layer, cosine in enumerate(cosines):
        if cosine is not None and cosine > SMOOTH:
            where = f"entering layer {layer}" if layer < len(cosines) - 1 else "in the output"
            return [
                f"over-smoothing: tokens {where} have a mean cosine of {cosine:.2f}; see docs/neutreno.md (a few "
                "channels far larger than the rest give the same number)"
            ]
    return []


class _Text:
    """The text a model is run on to see its tokens, in batches; empty where there is no tokenizer to read it."""

    def __init__(self, model: str | Path | torch.nn.Module, family: Family, text, notes: list[str]):
        from gaugekit.hf import loading

        self.model, self.family, self.batches = model, family, []
        if family.divided is not None:
            if text is not None:
                raise ValueError(f"text: expected none for this model, since {family.divided}")
            notes.append(f"token_cosine: not computed, since {family.divided}")
            return
        live = isinstance(model, torch.nn.Module)
        path = loading.home(model) if live else Path(model)
        tokenizer = loading.tokenizer(path) if path is not None else None
        if tokenizer is not None:  # it may stand there for another part of the model
            kind = type(model) if live else loading.architecture(path)
            tokenizer = tokenizer if loading.reads(kind) == "input_ids" else None
        if tokenizer is None:
            if text is not None:
                raise ValueError("text: expected a tokenizer beside the model to read text with, found none")
            notes.append("token_cosine: no tokenizer was found, so no text was read")
            return
        config = loading.config(path)
        text = sentences(SENTENCES) if text is None else text
        ids = token_ids(tokenizer, text, loading.positions(config))
        self.batches = list(batches([row for row in ids if len(row) > 1], 32, padding(config)))

    def __len__(self) -> int:
        return len(self.batches)

    def look(self, states: int, advance: Callable[[], None]) -> tuple[list, list]:
        """(token cosine of each hidden state, energy of each layer), means over texts.

        The cosine is the mean over two different tokens: with u_i the n token vectors of a text scaled to length 1,
        (‖Σ u_i‖² − n) / (n(n−1)). Energies are None where our attention does not take the model, and both are None
        of layers that run more than once; the last cosine is that of the output.
        """
        if not self.batches:
            return [None] * states, [None] * (states - 1)
        from gaugekit.hf import loading

        if isinstance(self.model, torch.nn.Module):
            live, was = self.model, [module for module in self.model.modules() if module.training]
        else:
            path = Path(self.model)
            live, was = loading.model(path, loading.stored_dtype(path)), []
        stack = contextlib.ExitStack()
        sums, texts = torch.zeros(states, dtype=torch.float64), 0
        energies = torch.zeros(states - 1, dtype=torch.float64)
        device = next(live.parameters()).device
        try:
            live.eval()
            once = self.family.once
            energy = stack.enter_context(_energies(live, states - 1)) if once else None
            for ids, mask in self.batches:
                inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
                with torch.no_grad():
                    out = live(**inputs, output_hidden_states=True, return_dict=True)
                entered = out.hidden_states if once else out.hidden_states[-1:]
                for index, state in enumerate(entered, states - len(entered)):
                    unit = torch.nn.functional.normalize(
                        state.to("cpu", torch.float64), dim=-1
                    ) * mask.unsqueeze(-1)
                    n = mask.sum(1).double()
                    sums[index] += ((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).sum()
                if energy is not None:
                    of_layers = [energy.energies[layer].double().mean(1).sum() for layer in range(states - 1)]
                    energies += torch.stack(of_layers).cpu()
                texts += len(ids)
                advance()
        finally:
            stack.close()
            for module in was:
                module.training = True
        means = [None] * (states - 1) if energy is None else (energies / texts).tolist()
        cosines = (sums / texts).tolist()
        return cosines if once else [None] * (states - 1) + cosines[-1:], means


@contextlib.contextmanager
def _energies(model: torch.nn.Module, layers: int) -> Iterator[NonlocalRegularizer | None]:
    """Collects the energies of a live model's attentions while it attends through ours; None where it cannot."""
    from gaugekit.hf.attention import interface, probe

    before = getattr(model.config, "_attn_implementation", None)
    taps, collector = [], None
    try:
        if probe.adopt(model) is not None:
            yield None
            return
        taps = interface.add_taps(model)
        collector = NonlocalRegularizer(model, relative=True)
        yield collector if collector.count == layers else None
    except ValueError:
        if collector is not None:
            raise
        yield None
    finally:
        if collector is not None:
            collector.remove()
        interface.remove_taps(model, taps)
        if before is not None:
            model.set_attn_implementation(before)
