"""How a call is cut among the ranks of a DTensor's mesh: one list of rules beside each operator (its ``sharding.py``).

An operator given DTensors runs by the rules that ``register`` hands to torch. A public function is composed of several,
torch's attention among them, which has no rule on every device; so it runs whole on each rank's own part (``local``),
by the same rules. torch.distributed.tensor takes seconds to import: nothing here does so before somebody else has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SUM = "sum"  # of an output: the ranks' parts add up to it
PLAIN = (Tensor, nn.Parameter, type(None))
GAINS = ("alpha", "beta", "gamma", "lam")  # [heads]
ROWS = (
    "grad",
    "a",
    "q",
    "k",
    "v",
    "v0",
    "lse",
    "u",
    "target",
    "energies",
    "log",
    "out",
    "grad_log",
)  # [B, heads, ...]
POSITIONS = ("query_start", "key_lengths")  # [B]


class Rule(NamedTuple):
    """One way to cut a call: ``inputs`` {argument: the dim that is cut}, every other argument being whole on all ranks;
    ``outputs`` the dim of each output that comes out cut, ``SUM``, or None for a whole one. ``even`` names the argument
    whose cut has to be even, because others are cut beside it."""

    inputs: Mapping[str, int]
    outputs: Sequence[int | str | None]
    even: str | None = None


Rules = Callable[[Mapping[str, Any]], list[Rule]]  # of a call's arguments by name
_rules: dict[str, Rules] = {}


def define(name: str, rules: Rules) -> None:
    """Makes ``rules`` those of the operator ``gaugekit::<name>``."""
    _rules[name] = rules


def attention(outputs: Sequence[str]) -> Rules:
    """Cuts of operators on [B, heads, ...]: by sequences, or by heads, whole groups of them.

    ``outputs`` names for each output the argument that it is laid out as: gains come out only as gradients.
    """

    def rules(given: Mapping[str, Any]) -> list[Rule]:
        there = [
            name for name, value in given.items() if isinstance(value, Tensor) or hasattr(value, "placements")
        ]
        rows = [name for name in there if name in ROWS]
        vectors = [name for name in there if name in GAINS and given[name].ndim]
        batch = dict.fromkeys([*rows, *(name for name in there if name in POSITIONS)], 0)
        heads = dict.fromkeys(rows, 1) | dict.fromkeys(vectors, 0)
        of_batch = [0 if name in rows else SUM if name in vectors else None for name in outputs]
        by_heads = Rule(heads, [heads.get(name) for name in outputs], even="k" if "k" in rows else "v")
        packed = given.get("cu_seqlens") is not None  # one row holds all sequences
        return [by_heads] if packed else [Rule(batch, of_batch), by_heads]

    return rules


def leading(name: str, given: Mapping[str, Any], outputs: Sequence[bool]) -> list[Rule]:
    """Cuts of a product by any dim of ``name`` [..., D] but the last: ``outputs`` says which come out cut so."""
    return [
        Rule({name: dim}, [dim if cut else SUM for cut in outputs]) for dim in range(given[name].ndim - 1)
    ]


@functools.cache
def register() -> None:
    """Hands the rules to torch (``torch.distributed.tensor.experimental.register_sharding``)."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, rules in _rules.items():
        operator = getattr(torch.ops.gaugekit, name).default
        register_sharding(operator)(functools.partial(_acceptable, operator, rules))


def register_beside() -> None:
    """``register``, where torch.distributed.tensor is imported by now."""
    if hasattr(torch.distributed, "tensor"):
        register()


def _acceptable(operator, rules: Rules, *arguments: Any) -> list[tuple[list, list]]:
    """The placements of outputs and inputs that torch may choose among, whole ones first."""
    from torch.distributed.tensor import Replicate

    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, arguments, strict=False))
    tensors = [name for name, value in given.items() if hasattr(value, "placements")]
    ranks = given[tensors[0]].mesh.size()
    whole = Rule({}, [None] * len(operator._schema.returns))
    fitting = [
        rule
        for rule in rules(given)
        if rule.even is None or given[rule.even].shape[rule.inputs[rule.even]] % ranks == 0
    ]
    return [
        (
            [_placement(cut) for cut in rule.outputs],
            [
                (_placement(rule.inputs[name]) if name in rule.inputs else Replicate())
                if name in tensors
                else None
                for name in given
            ],
        )
        for rule in (whole, *fitting)
    ]


def _cut(rule: Rule, given: Mapping[str, Any]) -> int:
    """How long what has to come out even is."""
    return given[rule.even].shape[rule.inputs[rule.even]]


def _placement(cut: int | str | None):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate() if cut is None else Partial() if cut == SUM else Shard(cut)


def shared(*tensors: Tensor | None) -> bool:
    """Whether a DTensor is among them."""
    for x in tensors:  # no generator: this stands in every call
        if type(x) not in PLAIN:
            break
    else:
        return False
    module = getattr(torch.distributed, "tensor", None)  # None: nobody imported it, so nobody has a DTensor
    return module is not None and any(isinstance(x, module.DTensor) for x in tensors)


def local(function: Callable[..., Tensor], rules: Rules, given: dict[str, Any]) -> Tensor:
    """``function(**given)`` on each rank's own part: a DTensor, cut as the first of the arguments is that can be.

    Tensors and lists beside DTensors are the same on every rank. What no rule cuts so is made whole first. ValueError
    where heads do not come out even.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not torch.compiler.is_compiling():
        register()
    beside = next(x for x in given.values() if isinstance(x, DTensor))
    mesh = beside.device_mesh
    for name, value in given.items():
        if name in GAINS + POSITIONS and isinstance(value, list | tuple):
            exact = torch.float64 if name in GAINS else torch.int64
            value = torch.tensor(value, dtype=exact, device=mesh.device_type)
            value = value if beside.dtype == torch.float64 or name in POSITIONS else value.float()
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        given[name] = value
    tensors = {name: x for name, x in given.items() if isinstance(x, DTensor)}
    chosen = [_asked(dim, rules(given), tensors) for dim in range(mesh.ndim)]
    for rule in chosen:
        ranks = 1
        for dim, other in enumerate(chosen):
            ranks *= mesh.size(dim) if other == rule else 1
        if rule is not None and rule.even is not None and (heads := _cut(rule, tensors)) % ranks:
            raise ValueError(
                f"{rule.even}: expected heads that {ranks} ranks share evenly, got {heads} of them"
            )
    parts = dict(given)
    for name, x in tensors.items():
        cuts = [None if rule is None else rule.inputs.get(name) for rule in chosen]
        grads = [
            Partial() if rule is not None and cut is None else _placement(cut)
            for rule, cut in zip(chosen, cuts, strict=True)
        ]
        parts[name] = x.redistribute(mesh, [_placement(cut) for cut in cuts]).to_local(grad_placements=grads)
    return _joined(function(**parts), mesh, chosen, tensors)


def _asked(dim: int, rules: Iterable[Rule], tensors: Mapping[str, Any]) -> Rule | None:
    """The rule that the placements of the arguments on a dim of the mesh ask for; None for none."""
    for name, x in tensors.items():
        placement = x.placements[dim]
        for rule in rules:
            if placement.is_shard() and rule.inputs.get(name) == placement.dim % x.ndim:
                return rule
    return None


def _joined(out: Tensor, mesh, chosen: Sequence[Rule | None], tensors: Mapping[str, Any]) -> Tensor:
    """The DTensor whose local part is ``out``; parts may be uneven, so its shape is that of what was cut beside it."""
    from torch.distributed.tensor import DTensor

    cuts, shape = [None if rule is None else rule.outputs[0] for rule in chosen], list(out.shape)
    for rule, cut in zip(chosen, cuts, strict=True):
        if rule is not None and rule.even is None:
            name = next(iter(rule.inputs))
            shape[cut] = tensors[name].shape[rule.inputs[name]]
    for dim, (rule, cut) in enumerate(zip(chosen, cuts, strict=True)):
        if rule is not None and rule.even is not None:
            shape[cut] *= mesh.size(dim)
    order = sorted(range(out.dim()), key=lambda dim: -out.stride(dim))
    stride = torch.empty_permuted(shape, order, device="meta").stride()
    placements = [_placement(cut) for cut in cuts]
    return DTensor.from_local(out, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
