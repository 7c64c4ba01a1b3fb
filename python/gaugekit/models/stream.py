"""The residual stream of a model: who reads it, through which norm, and who adds to it, in whatever family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Mlp:
    """The hidden units of an MLP: down(f(up(x))), or down(f(gate(x)) · up(x)) where there is a ``gate``.

    Paths of modules as in ``Junction``; ``activation`` is f, by transformers' name for it.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None


@dataclass(frozen=True)
class Junction:
    """One place where a block reads the stream x and adds to it: ``x ← x + Σ writer(..., reader(norm(x)))``.

    Paths of modules, without the base model's prefix. The last of ``writers`` is the last that runs; there are none
    where something beside the stream reads its end, as a decoder does an encoder's. A module that is missing from a
    config (an MLP without bias) is no matter: tensors are asked for by name. ``mlp`` tells which of them are an MLP's,
    where one of the parts is an MLP with one layer of hidden units.

    ``norm`` is None where x is read as it is. ``keys`` are those of ``readers`` that compute keys and have no bias:
    what a norm's bias adds to all keys, no softmax sees. What is added may be multiplied by ``scale``, the name of a
    tensor [D], or go through ``after``, the path of a norm.
    """

    norm: str | None
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    mlp: Mlp | None = None
    keys: tuple[str, ...] = ()
    scale: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Part:
    """What the model has no module for: rows ``first`` to ``end`` of the tensors ``weight`` and ``bias``."""

    weight: str
    bias: str
    first: int
    end: int


@dataclass(frozen=True)
class Exchange:
    """A constant may leave ``givers``, each a tensor [..., D], for rows ``first`` to ``end`` of ``taker`` [..., N, D],
    one of which is added to each token that a giver is added to. ``end`` None: to the last.
    """

    givers: tuple[str, ...]
    taker: str
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Stream:
    """A stream of a model: ``junctions[layer]`` in the order a block runs them, and both its ends.

    ``tokens`` and ``positions`` (None without) are the embeddings whose sum is the stream before layer 0, ``norm`` the
    last norm; ``head`` is the module of a model with a head that makes logits of it, by its path in that model (no
    prefix), ``tied`` whether it shares the matrix of ``tokens``. ``eps`` and ``centred`` are those of every norm:
    centred ones subtract the mean first (LayerNorm). ``transposed``: the modules of the blocks keep their weights
    [inputs, outputs]. ``dropouts`` are the entries of the config that drop parts of the stream, or whole layers, in
    training. ``size`` is D.

    Of some families alone: ``norm`` is None where the last norm is that of a junction; ``tables`` are names of other
    tensors [..., D] in the first sum, ``patches`` is the convolution in it, ``entries`` are norms that it goes through
    before layer 0, ``exchanges`` what may go from one of its terms to another beside tokens and positions. ``heads``
    read what ``head`` reads, each ``reads`` tokens at once. ``parts`` are readers that are no modules, by the paths
    they go by here. A norm multiplies by its weight and ``offset``. ``unturned`` says why no rotation passes. ``raw``:
    without its head, a model gives the stream as it is before the last norm. ``copies`` are names under which a file
    may hold the matrix of ``tokens`` again. ``beside`` are paths of modules and tensors that stand beside the stream:
    nothing of it goes through them on its way to the output. What is named nowhere here, and has an axis of D, has no
    view (``stream_view.strangers``).
    """

    size: int
    junctions: tuple[tuple[Junction, ...], ...]
    tokens: str | None
    positions: str | None
    norm: str | None
    head: str | None
    tied: bool
    eps: float
    centred: bool
    transposed: bool = False
    dropouts: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    patches: str | None = None
    entries: tuple[str, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    heads: tuple[str, ...] = ()
    reads: int = 1
    parts: Mapping[str, Part] = field(default_factory=dict)
    offset: float = 0.0
    unturned: str | None = None
    raw: bool = False
    copies: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def places(self) -> int:
        """How many junctions there are in all."""
        return sum(map(len, self.junctions))


def folded(
    weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What reads a norm, with that norm's ``gain`` and bias ``shift`` in it: W diag(g) and b + W β.

    ``weight`` [outputs, D]. A ``bias`` of None stays None: a shift that is not zero then has no place to go.
    """
    if shift is not None and bias is not None:
        bias = added(bias, weight @ shift)
    return weight * gain, bias


def added(bias: Tensor, answers: Tensor) -> Tensor:
    """``bias`` [labels] with ``answers`` [labels·n] in it: those of a head that reads n tokens at once are summed."""
    return bias + answers.unflatten(0, (len(bias), -1)).sum(1)


def centred(matrix: Tensor) -> Tensor:
    """Rows of ``matrix`` [..., D] without their mean: what a norm that subtracts the mean sees of them."""
    return matrix - matrix.mean(-1, keepdim=True)
