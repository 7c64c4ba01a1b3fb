"""What is measured: cases, registered by operator.

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
no figure on red). ``without_us`` names the rival that is the same mathematics as a good user would write it today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Case:
    """One measurement: the same work done by us and by each rival, timed in interleaved pairs.

    ``bytes_moved`` and ``flops`` are the least the mathematics needs (each input read once, each output written once);
    they give ``share_of_peak`` against the machine's own copy bandwidth and matrix product, measured in the same run.
    ``rounds`` undisturbed rounds are enough, where they last ``seconds``; the end is at eight times that.
    ``control`` names two rivals, the same arithmetic on one thread and on two: a round in which either was clearly
    slower than it can be was disturbed, on a core that the system believes to be ours.
    ``label`` says what a reader must know to compare fairly (fresh or reused buffer, page size, ...).
    """

    op: str
    shape: str
    dtype: str
    device: str
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object] | None]
    without_us: str
    check: Callable[[], None]
    bytes_moved: int = 0
    flops: int = 0
    label: str = ""
    threads: int | None = None
    rounds: int = 25
    seconds: float = 3.0
    control: tuple[str, str] | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.without_us not in self.rivals:
            raise ValueError(
                f"without_us must name one of the rivals {list(self.rivals)}, got {self.without_us!r}"
            )
        if self.control and not all(self.rivals.get(name) for name in self.control):
            raise ValueError(f"control must name two of the rivals {list(self.rivals)}, got {self.control!r}")


ONLY: list[
    str
] = []  # words that the cases to measure have in their shape, dtype or label; all cases if empty


def wanted(text: str) -> bool:
    """Whether a case of this shape, dtype and label is asked for: a generator may ask before it builds a costly one."""
    return all(word in text for word in ONLY)


BENCHMARKS: dict[str, Callable[[str, bool], Iterator[Case]]] = {}


def benchmark(op: str):
    """Registers a generator ``(device, quick) -> cases`` under the operator's name."""

    def register(generator):
        BENCHMARKS[op] = generator
        return generator

    return register
