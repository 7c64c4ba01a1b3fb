"""What is held, how many bytes each takes, and which were used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container


class Ledger:
    """Names and their bytes, the least recently used first, within ``limit_bytes``; not locked: its owner is.

    Room is reserved before a block is written, and what is held and what is reserved are never above the limit
    together, not while several blocks are being written either.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.held_bytes = self.reserved_bytes = 0

    def touch(self, name: bytes) -> bool:
        """Whether ``name`` is held; it then counts as used just now."""
        if name not in self.sizes:
            return False
        self.sizes.move_to_end(name)
        return True

    def drop(self, name: bytes) -> bool:
        """Whether ``name`` was held; it is no more."""
        size = self.sizes.pop(name, None)
        self.held_bytes -= size or 0
        return size is not None

    def reserve(self, size: int, name: bytes, kept: Container[bytes] = ()) -> tuple[bool, list[bytes]]:
        """(whether ``size`` is now reserved for ``name``, the names that were dropped for it).

        What goes is what ``name`` held before, then the least recently used that is not ``kept``, as many as it takes.
        Where that is not enough, nothing is reserved, and only what ``name`` held goes: of two that wait for room, each
        would wait for the other's otherwise.
        """
        missing = self.held_bytes + self.reserved_bytes + size - self.limit_bytes
        gone = []
        if missing > 0 and name in self.sizes:
            missing -= self.sizes[name]
            gone.append(name)
            self.drop(name)
        others = []
        for other, bytes_of_other in self.sizes.items():
            if missing <= 0:
                break
            if other != name and other not in kept:
                missing -= bytes_of_other
                others.append(other)
        if missing > 0:
            return False, gone
        for other in others:
            self.drop(other)
        self.reserved_bytes += size
        return True, gone + others

    def settle(self, size: int, name: bytes, written: bool = True) -> None:
        """Ends a reservation: ``name`` holds it, instead of what it held, or nothing was ``written``."""
        self.reserved_bytes -= size
        if written:
            self.drop(name)
            self.sizes[name] = size
            self.held_bytes += size
