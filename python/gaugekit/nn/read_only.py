"""Views of numbers that were decoded to be read: a write to one would be lost, so it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only


def copied_out(plain: Tensor, copy: bool | None, asked: dict[str, Any]) -> Any:
    """The DLPack capsule of a copy of ``plain``: who takes one may write to it. BufferError where none may be made."""
    if copy is False:
        raise BufferError(
            "copy: expected None or True for a packed weight, whose numbers are decoded, got False"
        )
    return plain.clone().__dlpack__(**asked)


class ReadOnly(torch.Tensor):
    """A tensor that every operator may read and none may write to: RuntimeError for one that does."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=plain.device,
            requires_grad=False,
        )

    def __init__(self, plain: Tensor):
        self.plain = plain

    @classmethod
    def of(cls, out: Any) -> Any:
        """``out`` with each of its tensors read-only."""
        return tree_map(lambda leaf: cls(leaf) if type(leaf) is torch.Tensor else leaf, out)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = args[place] if place < len(args) else kwargs.get(argument.name)
                if any(
                    isinstance(tensor, ReadOnly)
                    for tensor in (target if isinstance(target, list) else [target])
                ):
                    raise RuntimeError(
                        f"{func}: expected a plain tensor to write to, got a view of a packed weight; .clone() it"
                    )
        args, kwargs = tree_map_only(ReadOnly, lambda view: view.plain, (args, kwargs))
        out = func(*args, **kwargs)
        return cls.of(out) if any(r.alias_info is not None for r in func._schema.returns) else out

    def __tensor_flatten__(self):
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return ReadOnly(inner["plain"])

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.plain.untyped_storage()

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def numpy(self, *, force: bool = False) -> np.ndarray:
        array = self.plain.numpy(force=force)
        array.flags.writeable = False
        return array

    def __dlpack__(self, *, copy: bool | None = None, **asked: Any) -> Any:
        return copied_out(self.plain, copy, asked)

    def tolist(self) -> list:
        return self.plain.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"ReadOnly({self.plain!r})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), self.plain.clone())

    def __reduce_ex__(self, protocol):
        return self.plain.__reduce_ex__(protocol)
