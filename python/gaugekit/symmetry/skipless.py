"""The basis between the layers of a model without skips, which carries whole matrices from one layer into the next.

Where nothing but matrices stands between an MLP and the projections of the layer after it, no skip and no norm, X may
be written in any basis: (X, W_Q, W_K, W_V) → (X G, G⁻¹ W_Q, G⁻¹ W_K, G⁻¹ W_V), G in GL(D), taken up by what makes X.
With G = W_V that layer's value matrix is the identity, and need not be there at all; or W_Q, or W_K. Where an output
matrix is followed by an MLP alone, the MLP's first matrix takes it up. Graef, "Transformer tricks: Removing weights for
skipless transformers" (arXiv 2404.12362); arXiv 2510.23912.

The models are ``hf.sas``'s: block "skipless", and "sas_p" with output matrices, whose MLP reads X beside the attention;
both with norm "none". The first layer keeps its matrices: what it reads comes out of a norm. Of others:

- block "sas" and "pre_ln" have a skip, which carries X on, and every norm divides by a length that G changes: of GL(D)
  a RMSNorm passes the rotations, and its gain those among channels of equal gain.
- values that are slices of X (no value matrix) keep each head to its own D/H channels: only G that mixes no heads
  passes attention, and only where an output matrix or the values after it take it up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from gaugekit.symmetry.action import random_matrices

MATRICES = {
    "value": "values",
    "query": "queries",
    "key": "keys",
    "output": "outputs",
}  # and the config's entry


class JointBasis:
    """GL(D) at each place between two layers of a skipless model: elements [L − 1, D, D], row vectors, x → x G."""

    name = "joint_basis"

    def dimension(self, model: nn.Module) -> int:
        """(L − 1)·D², or 0 where something else than matrices stands between the layers."""
        return 0 if why_not(model) else (len(_blocks(model)) - 1) * model.config.hidden_size**2

    def random(self, model: nn.Module, generator: Generator | None = None) -> Tensor:
        """A random element, well conditioned."""
        return random_matrices(len(_blocks(model)) - 1, model.config.hidden_size, generator)

    @torch.no_grad()
    def act(self, model: nn.Module, element: Tensor) -> None:
        """Moves the live ``model`` in place, in float64, rounded to its dtype.

        Raises ValueError, before anything is written, where there is no such freedom, for an element of another shape
        and for a singular one.
        """
        if reason := why_not(model):
            raise ValueError(f"{self.name}: this model has no such freedom ({reason})")
        count, size = len(_blocks(model)) - 1, model.config.hidden_size
        if element.shape != (count, size, size):
            raise ValueError(
                f"element of {self.name}: expected shape {(count, size, size)}, got {tuple(element.shape)}"
            )
        if gone := [name for name in ("query", "key", "value") if _missing(model, name)]:
            raise ValueError(
                f"{self.name}: expected matrices for queries, keys and values, got none for {gone[0]}"
            )
        for layer, turn in enumerate(element, 1):
            _check_invertible(turn, f"element of {self.name}", "matrix", f"before layer {layer}")
        _turn(model, element)

    def fix(self, model: nn.Module, matrix: str = "value") -> None:
        """Makes the ``matrix`` ("value", "query" or "key") of every layer but the first the identity, in place.

        Raises ValueError, before anything is written, where there is no such freedom, and where a layer has no such
        matrix or a singular one.
        """
        if matrix == "output":
            raise ValueError("matrix: expected one of value, query, key; got 'output', which nothing divides")
        _check(model, matrix)
        if elements := _elements(model, matrix):
            self.act(model, torch.stack(elements))

    def contains(self, model: nn.Module, other: nn.Module) -> bool:
        """Membership: whether some element carries ``model`` to ``other``, to rounding; both in float64.

        Raises ValueError as ``fix`` does of ``model``; an ``other`` that cannot be fixed is none of its orbit.
        """
        mine, theirs = copy.deepcopy(model), copy.deepcopy(other)
        self.fix(mine)
        shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (mine, theirs)]
        if shapes[0] != shapes[1]:
            return False
        try:
            self.fix(theirs)
        except ValueError:
            return False
        bound = 1e4 * torch.finfo(torch.float64).eps * model.config.hidden_size
        fixed = theirs.state_dict()
        return all(
            bool((tensor - fixed[name].to(tensor)).abs().max() <= bound * max(1.0, float(tensor.abs().max())))
            for name, tensor in mine.state_dict().items()
        )


def why_not(model: nn.Module) -> str | None:
    """What stands between the layers of ``model`` beside matrices; None where nothing does."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "gaugekit_sas":
        return "it is no skipless model of gaugekit's (SASForCausalLM, ...)"
    if config.block not in ("skipless", "sas_p"):
        return f"its blocks are of the kind {config.block!r}, with a skip that carries the stream on"
    if config.norm != "none":
        return f"a norm ({config.norm!r}) stands before each layer, and divides by a length that a matrix changes"
    if config.block == "sas_p" and not config.outputs:
        return "attention adds slices of its input to the stream, and no output matrix takes up another basis"
    return None


@torch.no_grad()
def absorb(model: nn.Module, matrix: str = "value") -> nn.Module:
    """A new model that computes the same without that ``matrix`` in every layer but the first: its neighbours carry it.

    The function is the same exactly, the arithmetic is float64 and rounded once to the dtype of ``model``, which stays
    as it is. The result is an ordinary SAS model: it saves, loads, generates and trains. A SAS-P or skipless model with
    value and output matrices loses one D × D matrix a layer; a skipless one may lose "output" as well as one of the
    other three, so that its attention has neither value nor output matrix.

    model: a live SASModel, SASForCausalLM or SASForMaskedLM of norm "none"
    matrix: "value", "query", "key" (D columns in all: heads or groups times K is D), or "output" of a skipless model

    Raises ValueError where the model has no such matrix, where a norm or a skip is in its way, and where the matrix is
    singular.
    """
    _check(model, matrix)
    work = type(model)(model.config).double()
    work.load_state_dict(model.state_dict())
    blocks = _blocks(work)
    if matrix == "output":
        for block in blocks:
            for reader in (part for part in (block.mlp.gate, block.mlp.up) if part is not None):
                reader.weight.copy_(reader.weight @ block.attention.output.weight)
    else:
        _turn(work, _elements(work, matrix), but=matrix)
    first = next(model.parameters())
    return _without(work, matrix).to(first.device, first.dtype).train(model.training)


def _check(model: nn.Module, matrix: str) -> None:
    """ValueError unless every layer of ``model`` but the first has that ``matrix``, and neighbours take it up."""
    if matrix not in MATRICES:
        raise ValueError(f"matrix: expected one of {', '.join(MATRICES)}; got {matrix!r}")
    if reason := why_not(model):
        raise ValueError(f"model: its {matrix} matrices cannot be absorbed: {reason}")
    if matrix == "output" and model.config.block != "skipless":
        raise ValueError(
            "matrix: expected 'value', 'query' or 'key' for block 'sas_p', whose MLP stands beside it"
        )
    if _missing(model, matrix):
        raise ValueError(f"model: expected a {matrix} matrix in every layer, got none in some")


def _without(work: nn.Module, matrix: str) -> nn.Module:
    """The model of another config and the same numbers, those of the absorbed matrices aside."""
    entries = {**work.config.to_dict(), MATRICES[matrix]: False}
    if matrix == "value":
        entries["first_value"] = True  # the first layer's, as α·I + β·W
    result = type(work)(type(work.config).from_dict(entries)).double()
    own = result.state_dict()
    kept = {name: tensor for name, tensor in work.state_dict().items() if name in own}
    if matrix == "value":
        first = next(name for name in own if name.endswith("layers.0.attention.value.alpha")).removesuffix(
            "alpha"
        )
        kept |= {f"{first}alpha": torch.zeros(1), f"{first}beta": torch.ones(1)}
    result.load_state_dict(kept)
    return result


def _turn(model: nn.Module, turns: Sequence[Tensor], but: str | None = None) -> None:
    """x → x G in front of every layer but the first, by one of ``turns`` each: what makes x is multiplied by G, what
    reads it divided; ``but`` is left out. Nothing is written before all of it is computed.
    """
    blocks, moved = _blocks(model), []
    for before, after, turn in zip(blocks[:-1], blocks[1:], turns, strict=True):
        writers = [before.mlp.down] + ([before.attention.output] if model.config.block == "sas_p" else [])
        for writer in writers:  # weight [outputs, inputs]
            weight = _dense(writer)
            moved.append((writer.weight, turn.to(weight).mT @ weight))
        readers = [getattr(after.attention, name) for name in ("query", "key", "value") if name != but]
        if model.config.block == "sas_p":
            readers += [part for part in (after.mlp.gate, after.mlp.up) if part is not None]
        for reader in readers:
            weight = _dense(reader)
            moved.append((reader.weight, torch.linalg.solve(turn.to(weight), weight.mT).mT))
    for parameter, value in moved:
        parameter.copy_(value)


def _elements(model: nn.Module, matrix: str) -> list[Tensor]:
    """The ``matrix`` of every layer but the first, as it acts on row vectors [D, D]; ValueError for a singular one."""
    elements = [_dense(_part(block, matrix)).mT for block in _blocks(model)[1:]]
    for layer, element in enumerate(elements, 1):
        _check_invertible(element, "matrix", f"{matrix} matrix", f"in layer {layer}")
    return elements


def _check_invertible(matrix: Tensor, argument: str, what: str, where: str) -> None:
    size = matrix.shape[0]
    if matrix.shape[1] != size:
        raise ValueError(f"{argument}: expected a square {what}, got {tuple(matrix.shape)} {where}")
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{argument}: expected finite numbers in the {what} {where}, got NaN or infinity")
    spectrum = torch.linalg.svdvals(matrix.double())
    if spectrum[-1] <= spectrum[0] * size * torch.finfo(torch.float64).eps:
        raise ValueError(f"{argument}: expected an invertible {what} {where}, got a singular one")


def _missing(model: nn.Module, matrix: str) -> bool:
    """Whether some layer has no matrix of that kind."""
    return any(not isinstance(_part(block, matrix), nn.Linear) for block in _blocks(model)[1:])


def _part(block: nn.Module, matrix: str) -> nn.Module | None:
    return getattr(block.attention, matrix)


def _dense(part: nn.Module) -> Tensor:
    """The weight [outputs, inputs] of a matrix, float64."""
    return part.weight.detach().double()


def _blocks(model: nn.Module) -> nn.ModuleList:
    return getattr(model, "model", model).layers
