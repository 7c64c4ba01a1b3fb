"""The residual stream of a model: who reads it, through which norm, and who adds to it, in whatever family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Junction:
    """One place where a block reads the stream x and adds to it: ``x ← x + Σ writer(..., reader(norm(x)))``.

    Paths of modules, without the base model's prefix. The last of ``writers`` is the last that runs. A module that is
    missing from a config (an MLP without bias) is no matter: tensors are asked for by name.
    """

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """The stream of a whole model: ``junctions[layer]`` in the order a block runs them, and both its ends.

    ``tokens`` and ``positions`` (None without) are the embeddings whose sum is the stream before layer 0, ``norm`` the
    last norm; ``head`` is the module of a model with a head that makes logits of it, by its path in that model (no
    prefix), ``tied`` whether it shares the matrix of ``tokens``. ``eps`` and ``centred`` are those of every norm:
    centred ones subtract the mean first (LayerNorm). ``transposed``: the modules of the blocks keep their weights
    [inputs, outputs]. ``dropouts`` are the entries of the config that drop parts of the stream, or whole layers, in
    training. ``size`` is D.
    """

    size: int
    junctions: tuple[tuple[Junction, ...], ...]
    tokens: str
    positions: str | None
    norm: str
    head: str
    tied: bool
    eps: float
    centred: bool
    transposed: bool = False
    dropouts: tuple[str, ...] = ()

    @property
    def places(self) -> int:
        """How many junctions there are in all."""
        return sum(map(len, self.junctions))
