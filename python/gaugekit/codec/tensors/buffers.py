"""Memory that is used again for piece after piece: new pages cost more than what is coded into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

Room = Callable[[int], np.ndarray]  # gives uint8 [bytes] to write into


class Buffers:
    """Arrays for pieces of about the same size, as many as are in use at once. Any thread may take and give."""

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], uninitialised; ``give`` it back when nobody needs what was written there."""
        try:
            held = self._free.pop()
        except IndexError:
            held = np.empty(size, np.uint8)
        if held.size < size:
            held = np.empty(size, np.uint8)
        return held[:size]

    def give(self, taken: np.ndarray) -> None:
        """Has the memory of ``taken``, or of a part of it, used again."""
        self._free.append(taken if taken.base is None else taken.base)

    @contextmanager
    def room(self) -> Iterator[Room]:
        """``take`` for what is needed no longer than this."""
        taken = []

        def take(size: int) -> np.ndarray:
            taken.append(self.take(size))
            return taken[-1]

        try:
            yield take
        finally:
            for array in taken:
                self.give(array)
