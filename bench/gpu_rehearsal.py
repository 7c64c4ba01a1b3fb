"""The run's bookkeeping on a clock of its own: pieces that end well, fail, hang, do not start; a run that is stopped.

What happens is decided piece by piece, and nothing waits: a run of eight minutes is over at once.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import gpu_ledger as ledger
from gpu_pieces import SECONDS, pieces
from gpu_runner import Piece, Runner

HANGS = float("inf")


@dataclass(frozen=True)
class Fate:
    """How long a piece takes and with what status it ends; or the error it starts with, or a run stopped meanwhile."""

    seconds: float = 1.0
    status: int = 0
    error: OSError | None = None
    stops_after: float = HANGS


class FakeProcess:
    def __init__(self, machine: FakeMachine, fate: Fate):
        self.machine, self.fate, self.began, self.killed = machine, fate, machine.now(), False

    def poll(self) -> int | None:
        return self.fate.status if self.passed() >= self.fate.seconds else None

    def passed(self) -> float:
        return self.machine.now() - self.began

    def kill(self) -> None:
        self.killed = True

    def tail(self) -> str:
        return "the last line"


class FakeMachine:
    """A clock that only ``sleep`` moves, and processes that do what their fate says (one second, well, by default)."""

    def __init__(self, fates: dict[str, Fate]):
        self.fates, self.time, self.processes = fates, 0.0, {}

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def stopping(self) -> bool:
        return any(process.passed() >= process.fate.stops_after for process in self.processes.values())

    def start(self, piece: Piece) -> FakeProcess:
        fate = self.fates.get(piece.name, Fate())
        if fate.error is not None:
            raise fate.error
        self.processes[piece.name] = FakeProcess(self, fate)
        return self.processes[piece.name]


def rehearse(fates: dict[str, Fate], out: Path) -> tuple[FakeMachine, dict[str, dict]]:
    """A whole run with these fates: the machine afterwards, and for each piece the line of its end."""
    machine = FakeMachine(fates)
    Runner(machine, out, SECONDS).run(pieces(out))
    lines, torn = ledger.lines_of(out / ledger.PIECES)
    assert torn == 0
    return machine, {line["piece"]: line for line in lines if line["event"] == "end"}


def faults() -> tuple[list[str], float]:
    """What the bookkeeping gets wrong, in words (nothing, it is hoped), and the seconds of a run at its longest."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        names = [piece.name for piece in pieces(Path(folder))]
        machine, ends = rehearse(dict.fromkeys(names, Fate(HANGS)), Path(folder) / "hangs")
        longest = machine.now()
        if longest > SECONDS + 1:
            wrong.append(f"a run in which everything hangs takes {longest:.0f} s, more than {SECONDS}")
        if not all(process.killed for process in machine.processes.values()):
            wrong.append("a piece that hangs is left running")
        expected = dict.fromkeys(names, "timeout")
        fates = {
            "smoke": Fate(HANGS),
            "rans": Fate(2, 1),
            "tests": Fate(3, -9),
            "tiles": Fate(error=OSError("no")),
        }
        cases = [
            ("everything hangs", {name: end["status"] for name, end in ends.items()}, expected),
            (
                "some pieces fail",
                {name: end["status"] for name, end in rehearse(fates, Path(folder) / "some")[1].items()},
                dict.fromkeys(names, "ok")
                | {"smoke": "timeout", "rans": "failed", "tests": "failed", "tiles": "failed"},
            ),
            (
                "stopped while the tests run",
                {
                    name: end["status"]
                    for name, end in rehearse({"tests": Fate(HANGS, stops_after=5)}, Path(folder) / "stop")[
                        1
                    ].items()
                },
                dict.fromkeys(names, "skipped")
                | dict.fromkeys(("ceilings", "smoke", "once"), "ok")
                | {"tests": "stopped"},
            ),
        ]
        for what, found, wanted in cases:
            if found != wanted:
                differ = {name: found.get(name) for name in wanted if found.get(name) != wanted[name]}
                wrong.append(f"{what}: {differ}")
        for run in ("hangs", "some", "stop"):
            if not (Path(folder) / run / ledger.TABLE).exists():
                wrong.append(f"{run}: no table at the end")
    return wrong, longest
