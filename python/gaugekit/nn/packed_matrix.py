"""A matrix that stays packed in memory and is a tensor to everyone who asks: a layer's weight, or several layers'."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from gaugekit.nn.read_only import ReadOnly, copied_out
from gaugekit.ops.packed_linear.weight import PackedWeight, check, empty_weight, pack_weight

PARTS = PackedWeight._fields[:5]
PRIVATE = {"_cell", "_pinned", "_takes_copies", "_is_param"}
FROZEN = "packed weights are frozen: expected requires_grad=False; gaugekit.unfuse(model) makes them plain"
READ_ONLY = (
    "expected a plain tensor to write to, got a packed weight, which changes as a whole only: "
    "assign a matrix to it, or make it plain with gaugekit.unfuse(model)"
)


class _Cell:
    """What a packed matrix and its aliases share: the packed parts, and the plain matrix while somebody holds it."""

    __slots__ = ("count", "decoded", "parameter", "trainable", "transposed", "value")

    def __init__(self, value: PackedWeight, transposed: bool, count: int | None):
        self.value, self.transposed, self.count, self.trainable = value, transposed, count, True
        self.decoded: Callable[[], Tensor | None] = lambda: None
        self.parameter: Callable[[], PackedParameter | None] = lambda: None


class PackedMatrix(torch.Tensor):
    """A frozen matrix W [N, K] of bfloat16, float16 or float8_e5m2 in the layout of docs/resident.md (``transposed``:
    shown as Wᵀ).

    Or ``count`` matrices of one shape, experts' weights [count, N, K], which are packed as [count · N, K], each shown
    transposed where ``transposed``.

    Shape, dtype and device are there at once; an operator that needs the numbers decodes them. The matrix changes as a
    whole or not at all: assignment to ``.data`` packs what is assigned, and so does ``copy_`` into a detached alias,
    which is how wrappers hand out the first rank's weights; an operator that writes in place is refused with
    RuntimeError, through a view too. Detached aliases share the packed parts, as those of a plain tensor share memory.
    As a layer's weight it is a parameter that takes no gradient. Pickled it is packed as a parameter and plain as a
    detached alias, so what ``torch.save(model.state_dict())`` writes is a plain checkpoint.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        value: PackedWeight,
        transposed: bool = False,
        cell: _Cell | None = None,
        count: int | None = None,
    ):
        shape = _shape(value, transposed, count if cell is None else cell.count)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=value.dtype, device=value.raw.device, requires_grad=False
        )

    def __init__(
        self,
        value: PackedWeight,
        transposed: bool = False,
        cell: _Cell | None = None,
        count: int | None = None,
    ):
        self._cell = _Cell(value, transposed, count) if cell is None else cell
        self._pinned: Tensor | None = None
        self._takes_copies = False

    @classmethod
    def of(cls, weight: Tensor, transposed: bool = False) -> PackedMatrix:
        """Packs ``weight`` [N, K] or [count, N, K], or what it is the transpose of (see ``gaugekit.pack_weight``). What
        hangs on a parameter (its attributes, whether it is frozen) is kept for ``plain_parameter``."""
        count = weight.shape[0] if weight.dim() == 3 else None
        matrix = cls(pack_weight(_rows(weight, transposed)), transposed, count=count)
        if isinstance(weight, nn.Parameter):
            matrix._cell.trainable = weight.requires_grad
            matrix.__dict__.update(weight.__dict__)
        return matrix

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> PackedMatrix:
        """Zeros [``rows``, ``columns``] to load into, or a place for them on the device "meta"."""
        return cls(empty_weight(rows, columns, dtype, device))

    @property
    def value(self) -> PackedWeight:
        """The packed parts."""
        return self._cell.value

    @property
    def transposed(self) -> bool:
        return self._cell.transposed

    @property
    def count(self) -> int | None:
        """How many matrices of one shape these are; None for one that stands by itself."""
        return self._cell.count

    raw = property(lambda self: self._cell.value.raw)
    planes = property(lambda self: self._cell.value.planes)
    escapes = property(lambda self: self._cell.value.escapes)
    offsets = property(lambda self: self._cell.value.offsets)
    window = property(lambda self: self._cell.value.window)

    def unpack(self) -> Tensor:
        """The matrix as a plain tensor, bit for bit; the same one as long as somebody holds it."""
        plain = self._cell.decoded()
        if plain is None:
            plain = self._decode()
            if type(plain) is torch.Tensor:
                self._cell.decoded = weakref.ref(plain)
        return plain

    def _decode(self) -> Tensor:
        rows = torch.ops.gaugekit.packed_rows(None, *self.value)
        rows = rows if self.count is None else rows.view(_shape(self.value, False, self.count))
        return rows.mT.contiguous() if self.transposed else rows

    def hold(self, value: PackedWeight) -> None:
        """Takes other packed parts of this shape, for all aliases. ValueError where they do not fit together."""
        if value.shape != self.value.shape or value.dtype != self.value.dtype:
            raise ValueError(
                f"value: expected {self.value.dtype} {list(self.value.shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
        check(value)
        self._cell.value, self._cell.decoded = value, lambda: None

    def write(self, weight: Tensor) -> None:
        """Packs ``weight``, of the shape shown and cast to the dtype, in the place of what was there, for all aliases.
        RuntimeError for another shape, and in a graph that is being compiled, which could not hold it."""
        ours = isinstance(weight, (PackedMatrix, ReadOnly))
        if type(self.raw) is not Tensor or not (ours or type(weight) in (Tensor, nn.Parameter)):
            raise RuntimeError(f"weight: expected a plain tensor to pack, got a {type(weight).__name__}")
        if weight.shape != self.shape:
            raise RuntimeError(
                f"weight: expected {list(self.shape)}, got {list(weight.shape)}; a wrapper that cuts parameters in "
                "place (FullyShardedDataParallel) has to be told to ignore packed ones, fully_shard has not"
            )
        weight = weight.detach().to(self.device, self.dtype)
        if not self.is_meta:  # nothing is held on that device, as nothing is by a plain tensor
            weight = weight.clone() if ours else weight
            self.hold(pack_weight(_rows(weight, self.transposed)))

    def alias(self) -> PackedMatrix:
        # what is traced stays traceable
        kind = PackedMatrix if type(self.raw) is Tensor else type(self)
        return kind(self.value, self.transposed, self._cell)

    def parameter(self) -> PackedParameter:
        """This matrix as a layer's weight: the one parameter of all aliases on this device."""
        parameter = self._cell.parameter()
        if parameter is None or parameter.device != self.value.raw.device:
            parameter = PackedParameter(self.value, self.transposed, self._cell)
            parameter._is_param = True
            parameter.__dict__.update(self._attributes())
            self._cell.parameter = weakref.ref(parameter)
        return parameter

    def plain_parameter(self) -> nn.Parameter:
        """The matrix as a plain parameter of its own, bit for bit, frozen if it was before it was packed."""
        parameter = nn.Parameter(self._decode(), self._cell.trainable)
        parameter.__dict__.update(self._attributes())
        return parameter

    def received(self, weight: Tensor) -> PackedParameter:
        """The parameter, for all layers that share this place on the meta device, once ``weight`` is packed into it."""
        self._cell.value = pack_weight(_rows(weight, self.transposed))
        return self.parameter()

    def moved(self, change: Callable[[Tensor], Tensor]) -> PackedParameter:
        """The parameter after ``change`` (as of nn.Module._apply) of the parts; their dtypes stay."""
        parts = (change(part).to(part.dtype) for part in self.value[:5])
        self._cell.value = PackedWeight(*parts, self.value.columns)
        self._cell.decoded = lambda: None
        return self if self.value.raw.device == self.device else self.parameter()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            alias = args[0].alias()
            alias._takes_copies = args[0]._takes_copies or isinstance(args[0], nn.Parameter)
            return alias
        if written := _written(func, args, kwargs):
            if func is not torch.ops.aten.copy_.default or not written[0]._takes_copies:
                raise RuntimeError(f"{func}: {READ_ONLY}")
            written[0].write(args[1])
            return written[0]
        args, kwargs = tree_map_only(PackedMatrix, lambda matrix: matrix.unpack(), (args, kwargs))
        out = func(*args, **kwargs)
        return ReadOnly.of(out) if any(r.alias_info is not None for r in func._schema.returns) else out

    @property
    def data(self) -> PackedMatrix:
        return self.alias()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.device != self.device:
            raise RuntimeError(
                f"data: expected {self.device}, got {value.device}; move the layer by its own .to()"
            )
        if value is not self:
            self.write(value)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad:
            raise RuntimeError(FROZEN)
        return self

    def untyped_storage(self) -> torch.UntypedStorage:
        """A detached alias', as a saver reads it: the plain matrix'. A parameter's: its largest packed part."""
        if type(self.raw) is not torch.Tensor or self.is_meta:
            return super().untyped_storage()
        if not isinstance(self, nn.Parameter):
            return self._pin().untyped_storage()
        largest = max(self.value[:5], key=lambda part: part.nbytes)
        return largest.untyped_storage()[:]  # of its own: tracers tell tensors apart by their storages

    def data_ptr(self) -> int:
        if isinstance(self, nn.Parameter):
            raise RuntimeError("data_ptr: expected a plain tensor, got a packed weight; .clone() decodes it")
        return self._pin().data_ptr()

    def _pin(self) -> Tensor:
        if self._pinned is None:
            self._pinned = self.unpack()
        return self._pinned

    def numpy(self, *, force: bool = False) -> np.ndarray:
        array = self.unpack().numpy(force=force)
        array.flags.writeable = False
        return array

    def __dlpack__(self, *, copy: bool | None = None, **asked: Any) -> Any:
        return copied_out(self.unpack(), copy, asked)

    def tolist(self) -> list:
        return self.unpack().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"PackedMatrix({list(self.shape)}, dtype={self.dtype}, device={self.device}, {self.value.bytes:,} bytes)"

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            value = PackedWeight(*(part.clone() for part in self.value[:5]), self.value.columns)
            attributes = copy.deepcopy(self._attributes(), memo)
            twin = _rebuilt(value, self.transposed, self._cell.trainable, attributes, self.count)
            memo[id(self)] = twin.parameter() if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        if isinstance(self, nn.Parameter):
            rest = (self.transposed, self._cell.trainable, self._attributes(), self.count)
            return _parameter, (tuple(self.value), *rest)
        return self.unpack().__reduce_ex__(protocol)

    def _attributes(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in PRIVATE}


class PackedParameter(PackedMatrix):
    """A packed matrix as the weight of layers. Tracers take it apart into its five parts; what it is detached to they
    do not, so a wrapper that copies the first rank's weights copies numbers, not parts, whose sizes may differ."""

    def __tensor_flatten__(self):
        return list(PARTS), (self.value.columns, self.transposed, self.count)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        columns, transposed, count = meta
        value = PackedWeight(*(inner[name] for name in PARTS), columns)
        return PackedParameter(value, transposed, count=count)


def _shape(value: PackedWeight, transposed: bool, count: int | None) -> tuple[int, ...]:
    """The shape shown of packed rows: of one matrix, or of ``count``."""
    rows, columns = value.shape
    stack = () if count is None else (count,)
    matrix = (rows if count is None else rows // max(1, count), columns)
    return stack + (matrix[::-1] if transposed else matrix)


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    """The rows to pack of a matrix, or of several, one below the other."""
    return (weight.mT if transposed else weight).flatten(0, -2)


def _rebuilt(
    value: PackedWeight, transposed: bool, trainable: bool, attributes: dict, count: int | None = None
) -> PackedMatrix:
    matrix = PackedMatrix(value, transposed, count=count)
    matrix._cell.trainable = trainable
    matrix.__dict__.update(attributes)
    return matrix


def _parameter(value: tuple, *rest) -> PackedParameter:
    return _rebuilt(PackedWeight(*value), *rest).parameter()


def _matrices(arguments) -> list[PackedMatrix]:
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, PackedMatrix)]


def _written(func, args: tuple, kwargs: dict) -> list[PackedMatrix]:
    """The packed matrices among the arguments that ``func`` writes to: as its schema says, or, where a collective's
    says nothing, as its name does."""
    if func.namespace != "aten" and func._schema.name.endswith("_"):
        return _matrices((args, kwargs))
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _matrices(args[place] if place < len(args) else kwargs.get(argument.name))
    return written
