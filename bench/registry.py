"""What is measured: cases, registered by operator and by device.

A benchmark file ``ops/bench_<stem>.py`` registers one generator of cases::

    @benchmark("shaped_combine")
    def cases(device: str, quick: bool):
        ...
        yield Case(
            op="shaped_combine", shape="B4 T512 D768 H12 causal forward", dtype="float32", device=device,
            ours=lambda: ..., rivals={"torch.compile, cumsum": lambda: ..., "zipnn": None},
            without_us="torch.compile, cumsum", check=lambda: ..., bytes_moved=..., flops=...,
        )

``ours`` and every rival are called without arguments and do the whole work once. A rival that is ``None`` is not
installed: its row says absent. ``check`` raises if ``ours`` is wrong; a case that fails it is not timed (house law 8:
no figure on red). ``without_us`` names the rival that is the same mathematics as a good user would write it today, or
several of whom the fastest counts.

What a GPU runs stands in ``ops/gpu_<stem>.py`` under ``@benchmark(stem, device="cuda")``: that generator yields
``Planned`` cases, which take memory only once they are built, and their calls are ``Call``, a function beside its
operands, so that copies of the operands can take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

MOST_COPIES = 128


@dataclass
class Call:
    """A function and its operands: tensors; lists, tuples and named tuples of them; anything else."""

    function: Callable[..., object]
    operands: tuple

    def __call__(self):
        return self.function(*self.operands)

    @property
    def bytes(self) -> int:
        """Of all tensors among the operands."""
        return sum(x.numel() * x.element_size() for x in _tensors(self.operands))

    def copies(self, total_bytes: int) -> list[Call]:
        """This call, and as many on copies of its operands that all together hold ``total_bytes`` or more."""
        count = min(MOST_COPIES, math.ceil(total_bytes / self.bytes)) if self.bytes else 1
        return [self] + [Call(self.function, _copy(self.operands)) for _ in range(count - 1)]


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _copy(value):
    """Tensors with the strides and the need of a gradient that they had."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        items = [_copy(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@dataclass
class Case:
    """One measurement: the same work done by us and by each rival, timed in interleaved pairs.

    ``bytes_moved`` and ``flops`` are the least the mathematics needs (each input read once, each output written once);
    they give ``share_of_peak`` against the machine's own copy bandwidth and matrix product, measured in the same run.
    ``rounds`` undisturbed rounds are enough, where they last ``seconds``; the end is at eight times that.
    ``control`` names two rivals, the same arithmetic on one thread and on two: a round in which either was clearly
    slower than it can be was disturbed, on a core that the system believes to be ours.
    ``processor_time``: of one thread, what the processor spent on it is timed instead of the clock on the wall, and no
    round counts as disturbed: waiting for a processor is left out then, what others do to the caches is not.
    ``block``: a call is timed over as many calls as fill so many seconds.
    ``label`` says what a reader must know to compare fairly (fresh or reused buffer, page size, ...).
    ``goal`` is what a GPU row should reach: a rival's name, or "share_of_peak", and the least ratio or share.
    """

    op: str
    shape: str
    dtype: str
    device: str
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object] | None]
    without_us: str | tuple[str, ...]
    check: Callable[[], None]
    bytes_moved: int = 0
    flops: int = 0
    label: str = ""
    threads: int | None = None
    rounds: int = 25
    seconds: float = 3.0
    block: float = 2e-3
    control: tuple[str, str] | None = None
    processor_time: bool = False
    goal: tuple[str, float] | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        named = (self.without_us,) if isinstance(self.without_us, str) else self.without_us
        if not named or not set(named) <= set(self.rivals):
            raise ValueError(
                f"without_us must name one of the rivals {list(self.rivals)}, got {self.without_us!r}"
            )
        if self.control and not all(self.rivals.get(name) for name in self.control):
            raise ValueError(f"control must name two of the rivals {list(self.rivals)}, got {self.control!r}")
        if self.goal and self.goal[0] not in {"share_of_peak", *self.rivals}:
            raise ValueError(
                f"goal must name share_of_peak or one of the rivals {list(self.rivals)}, got {self.goal[0]!r}"
            )

    def build(self) -> Case:
        return self


@dataclass
class Planned:
    """A case before it is built: what names it, and ``make``, which gives its other fields when it is its turn."""

    op: str
    shape: str
    dtype: str
    make: Callable[[], dict]
    label: str = ""
    device: str = "cuda"

    def build(self) -> Case:
        return Case(self.op, self.shape, self.dtype, self.device, label=self.label, **self.make())


ONLY: list[
    str
] = []  # words that the cases to measure have in their shape, dtype or label; all cases if empty


def name_of(case: Case | Planned) -> str:
    """What ``wanted`` looks into, and what a listing prints."""
    return f"{case.shape} {case.dtype} {case.label}".rstrip()


def wanted(text: str) -> bool:
    """Whether a case of this shape, dtype and label is asked for: a generator may ask before it builds a costly one."""
    return all(word in text for word in ONLY)


BENCHMARKS: dict[str, Callable[[str, bool], Iterator[Case]]] = {}
GPU_BENCHMARKS: dict[str, Callable[[str, bool], Iterator[Planned]]] = {}


@dataclass
class OwnShape:
    """How a user's own shape of an operator is written, "ROWSxINPUTS", for example "1x4096"; ``make`` (numbers...,
    dtype, threads) gives its cases, and raises ValueError for numbers that do not go together. ``dtypes``: the first is
    taken where none is named.
    """

    pattern: str
    example: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[..., Iterator[Case]]

    def read(self, op: str, text: str, dtype: str | None) -> tuple[list[int], torch.dtype]:
        """The numbers of the shape ``text``, and the dtype; ValueError for what is none."""
        names = self.pattern.split("x")
        parts = text.lower().split("x")
        if len(parts) != len(names) or not all(
            part.isascii() and part.isdigit() and int(part) for part in parts
        ):
            raise ValueError(
                f"--shape: expected {self.pattern} for {op}, whole numbers such as {self.example}, got {text!r}"
            )
        known = {str(kind).removeprefix("torch."): kind for kind in self.dtypes}
        if dtype is not None and dtype not in known:
            raise ValueError(f"--dtype: expected one of {', '.join(known)} for {op}, got {dtype!r}")
        return list(map(int, parts)), self.dtypes[0] if dtype is None else known[dtype]


@dataclass(frozen=True)
class Own:
    """What a user asks for: shapes, dtype (None: the operator's first) and threads (None: as many as torch takes)."""

    shapes: tuple[str, ...]
    dtype: str | None = None
    threads: int | None = None


OWN_SHAPES: dict[str, OwnShape] = {}


def check_memory(needed: int) -> None:
    """ValueError where a user's own shape takes more bytes than are free: a system may kill what takes them. What is
    free only Linux says.
    """
    try:
        free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return
    if needed > free:
        raise ValueError(
            f"--shape: expected one that fits into the {free / 1e9:,.1f} GB of memory that are free, "
            f"got one that takes {needed / 1e9:,.1f} GB"
        )


def own_shape(op: str, pattern: str, example: str, *dtypes: torch.dtype):
    """Registers a generator of cases for shapes that users name, on a CPU; see ``OwnShape``."""

    def register(make):
        OWN_SHAPES[op] = OwnShape(pattern, example, dtypes, make)
        return make

    return register


def benchmark(op: str, device: str = "cpu"):
    """Registers a generator ``(device, quick) -> cases`` under the operator's name."""

    def register(generator):
        (GPU_BENCHMARKS if device == "cuda" else BENCHMARKS)[op] = generator
        return generator

    return register
