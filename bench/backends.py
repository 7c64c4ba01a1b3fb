"""How a program of calls is run and timed: on a GPU as a CUDA graph between two events, on a host call by call.

A program is a list of calls that are to run one after the other. Eager calls cost a GPU's host 30 to 100 µs of Python
each, more than many kernels take; replayed, a graph costs none of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


class NotCapturable(Exception):
    """A program that no graph can hold; the message says why."""


class HostBackend:
    """Calls timed on the host's clock, which has no graphs: what tests run the GPU's bookkeeping on."""

    device = "cpu"

    def __init__(self, cache_bytes: int = 32 << 20, now: Callable[[], float] = time.perf_counter):
        self.cache_bytes, self.now = cache_bytes, now

    def graph(self, calls: Sequence[Callable]) -> Callable[[], None]:
        raise NotCapturable("a host has no graphs")

    def seconds(self, run: Callable[[], None], repeats: int) -> float:
        """That all ``repeats`` take together."""
        begin = self.now()
        for _ in range(repeats):
            run()
        return self.now() - begin

    def peak_bytes(self, call: Callable) -> int | None:
        return None

    def clean(self) -> None:
        """Nothing is kept from one case to the next."""


class CudaBackend:
    """Graphs and events on the current device."""

    device = "cuda"

    def __init__(self):
        self.cache_bytes = torch.cuda.get_device_properties().L2_cache_size

    def graph(self, calls: Sequence[Callable]) -> Callable[[], None]:
        """A function that replays ``calls`` as one graph. NotCapturable where one synchronises or a capture fails."""
        self._warm(calls)
        current = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            self._probe(calls[0])
            with torch.cuda.graph(graph):
                outputs = [call() for call in calls]  # held, so that each writes to memory of its own
            del outputs
        except Exception as error:
            self._recover(current)
            raise NotCapturable(one_line(error)) from error
        torch.cuda.synchronize()
        return graph.replay

    @staticmethod
    def _warm(calls) -> None:
        """What compiles or allocates on its first calls does so before the capture, on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [calls[0], calls[0], *calls]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    @staticmethod
    def _probe(call) -> None:
        """An error where the call synchronises: found outside of a capture, it spoils nothing."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

    @staticmethod
    def _recover(stream) -> None:
        """A capture that failed leaves its stream current and the generator of random numbers in capture."""
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], None], repeats: int) -> float:
        """That all ``repeats`` take together."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    def peak_bytes(self, call: Callable) -> int:
        """Memory that the call allocates at its peak."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clean(self) -> None:
        """Gives memory back, and has torch.compile forget shapes: a second one would be compiled for any, slower."""
        torch.compiler.reset()
        torch.cuda.empty_cache()


def one_line(error: BaseException, most: int = 300) -> str:
    """The error's class and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:most].rstrip(": ")
