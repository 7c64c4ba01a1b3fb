"""The weights of a sliced model: a layer's matrices read, freed of their norms' gains, turned into their bases.

Row vectors: x is the stream in the original basis, x T_j in that of junction j. Gains and biases of a norm go into what
reads it; where norms subtract the mean first, M = I − 11ᵀ/D goes into what writes to the stream, which keeps the mean
at zero, so that the norm without it is the same function. A reader's W becomes W·diag(g)·T_j, a writer's Tᵀ M W.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from gaugekit.models import Junction, Stream
from gaugekit.models import stream as streams
from gaugekit.slicing.gauges import Frame

Read = Callable[[str], Tensor | None]  # a tensor by name, float64; None where the checkpoint has none


def centred(matrix: Tensor, stream: Stream) -> Tensor:
    """``matrix`` [..., D] M: rows without their mean, where the model's norms take it off."""
    return streams.centred(matrix) if stream.centred else matrix


def junction(
    parts: Junction, stream: Stream, read: Read, frame: Frame, following: Frame, width: int
) -> dict[str, Tensor]:
    """The tensors of one junction, by name: readers in the basis of ``frame``, writers and shortcut in that which
    follows. ``width`` is D′: a stream that is not sliced follows as it is, M and all.
    """
    gain, shift = read(f"{parts.norm}.weight"), read(f"{parts.norm}.bias")
    tensors: dict[str, Tensor] = {}
    for reader in parts.readers:
        # a reader without a bias has a shift of zero: ``check_shifts``
        weight, bias = streams.folded(*_linear(read, reader, stream), gain, shift)
        tensors |= _stored(reader, weight @ frame.basis, bias, stream)
    sliced = following.basis.shape[1] == width
    for writer in parts.writers:
        weight, bias = _linear(read, writer, stream)
        turned, shifted = weight.mT, bias
        if sliced:
            turned = centred(turned, stream) @ following.basis
            shifted = None if bias is None else centred(bias, stream) @ following.basis
        tensors[f"{writer}.weight"] = turned.mT
        if shifted is not None:
            tensors[f"{writer}.bias"] = shifted
    last = parts.writers[-1]
    return tensors | {f"{last}.shortcut.{name}": tensor for name, tensor in following.shortcut.items()}


def check_shifts(stream: Stream, read: Read) -> None:
    """ValueError where a norm has a bias that is not zero, and a layer that reads it none to take it up."""
    for parts in itertools.chain.from_iterable(stream.junctions):
        shift = read(f"{parts.norm}.bias")
        if shift is None or not shift.any():
            continue
        for reader in parts.readers:
            if read(f"{reader}.bias") is None:
                raise ValueError(f"{reader}: expected a bias, which takes up that of {parts.norm}; got none")


def embeddings(stream: Stream, read: Read, frame: Frame) -> dict[str, Tensor]:
    """The tensors of the embeddings in the first basis, by name, a tied table aside, which stays as it is."""
    basis = centred(frame.basis.mT, stream).mT
    tensors = {}
    if stream.tied:
        tensors[f"{stream.tokens}.rotation"] = basis
    else:
        tensors[f"{stream.tokens}.weight"] = read(f"{stream.tokens}.weight") @ basis
    if stream.positions is not None:
        tensors[f"{stream.positions}.weight"] = read(f"{stream.positions}.weight") @ basis
    return tensors


def head(stream: Stream, read: Read, frame: Frame, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a head that reads the sliced basis of ``frame``, by their names in it: the last norm's gain and
    bias are in them. ``weight`` and ``bias`` are the head's own; a tied one's stay where they are.
    """
    gain, shift = read(f"{stream.norm}.weight"), read(f"{stream.norm}.bias")
    if stream.tied:
        tensors = {"rotation": (gain[:, None] * frame.basis).mT}
        return tensors if shift is None else tensors | {"offset": shift}
    tensors = {"weight": (weight * gain) @ frame.basis}
    if shift is not None:
        bias = weight @ shift if bias is None else bias + weight @ shift
    return tensors if bias is None else tensors | {"bias": bias}


def _linear(read: Read, path: str, stream: Stream) -> tuple[Tensor, Tensor | None]:
    """The weight [outputs, inputs] and the bias of a module."""
    weight = read(f"{path}.weight")
    if weight is None:
        raise ValueError(f"checkpoint: expected a tensor {path}.weight, got none")
    return (weight.mT if stream.transposed else weight), read(f"{path}.bias")


def _stored(path: str, weight: Tensor, bias: Tensor | None, stream: Stream) -> dict[str, Tensor]:
    tensors = {f"{path}.weight": weight.mT if stream.transposed else weight}
    return tensors if bias is None else tensors | {f"{path}.bias": bias}
