"""Runs pieces, each in processes of its own, under a limit of its own and one for all; what ends badly is passed by.

Time and processes come from a ``Machine``, so that the bookkeeping can be tried with a clock and failures of its own.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import gpu_ledger as ledger

LEAST_SECONDS = 4.0  # with less than this left, a piece is not begun
POLL_SECONDS = 0.1
TAIL_LINES = 12


@dataclass(frozen=True)
class Piece:
    """A program to run for at most ``limit`` seconds; pieces of the same ``stage`` run side by side."""

    name: str
    stage: str
    limit: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


class Process(Protocol):
    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def kill(self) -> None:
        """Ends it and every process it started."""

    def tail(self) -> str:
        """The end of its output."""


class Machine(Protocol):
    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...

    def start(self, piece: Piece) -> Process: ...

    def stopping(self) -> bool:
        """Whether the run was asked to end early."""


class Stopped(Exception):
    """The run was asked to end early."""


class RealProcess:
    """A program whose output goes to the terminal and to a log while it runs."""

    def __init__(self, piece: Piece, log: Path, environment: dict[str, str]):
        self.name, self.log = piece.name, log
        self.last: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.process = subprocess.Popen(
            piece.command, env=environment | piece.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.log.open("a") as log:
            for line in self.process.stdout:
                self.last.append(line.rstrip())
                sys.stdout.write(f"[{self.name}] {line}")
                if log.tell() < ledger.LOG_BYTES:
                    log.write(f"[{self.name}] {line}")
                    log.flush()

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None:
            self.reader.join(timeout=2)  # a grandchild that outlives the program keeps its output open
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(timeout=2)

    def tail(self) -> str:
        return "\n".join(self.last)


class RealMachine:
    """This machine's clock and processes; SIGTERM and SIGINT ask the run to end."""

    def __init__(self, out: Path, environment: dict[str, str]):
        self.out, self.environment, self.asked = out, environment, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number, frame) -> None:
        """Written down, not raised: no process is lost between its start and the list of those that run."""
        self.asked = True

    def stopping(self) -> bool:
        return self.asked

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, piece: Piece) -> Process:
        return RealProcess(piece, self.out / ledger.LOG, self.environment)


@dataclass
class Running:
    piece: Piece
    process: Process
    began: float
    limit: float


class Runner:
    """Runs stages one after another until ``seconds`` have passed since it was made."""

    def __init__(self, machine: Machine, out: Path, seconds: float):
        self.machine, self.out = machine, out
        self.began = machine.now()
        self.end = self.began + seconds

    def line(self, **fields) -> None:
        at = round(self.machine.now() - self.began, 1)
        ledger.append(self.out / ledger.PIECES, {"at": at, **fields})

    def run(self, pieces: list[Piece]) -> bool:
        """Whether every piece ended well. The table is written whatever happens, an end from outside included."""
        stages: dict[str, list[Piece]] = {}
        for piece in pieces:
            stages.setdefault(piece.stage, []).append(piece)
        waiting, well = list(pieces), True
        try:
            for together in stages.values():
                waiting = [piece for piece in waiting if piece not in together]
                well &= self.stage(together)
        except Stopped:
            well = False
            for piece in waiting:
                self.ended(piece, "skipped", 0.0, "the run was stopped")
        finally:
            (self.out / ledger.TABLE).write_text(ledger.table(self.out))
        return well

    def stage(self, pieces: list[Piece]) -> bool:
        """Runs the pieces side by side; each ends at its limit, and all of them at the end of the run."""
        running = [started for started in map(self.begin, pieces) if started]
        well = len(running) == len(pieces)
        try:
            while running:
                if self.machine.stopping():
                    raise Stopped
                for one in list(running):
                    status = self.step(one)
                    if status:
                        running.remove(one)
                        well &= status == "ok"
                if running:
                    self.machine.sleep(POLL_SECONDS)
        except Stopped:
            for one in running:
                one.process.kill()
                self.ended(one.piece, "stopped", self.machine.now() - one.began, "the run was stopped")
            raise
        return well

    def begin(self, piece: Piece) -> Running | None:
        now = self.machine.now()
        limit = min(piece.limit, self.end - now)
        if limit < LEAST_SECONDS:
            self.ended(piece, "skipped", 0.0, "no time was left")
            return None
        self.line(piece=piece.name, event="begin", limit=round(limit, 1))
        try:
            return Running(piece, self.machine.start(piece), now, limit)
        except OSError as error:
            self.ended(piece, "failed", 0.0, f"did not start: {error}")
            return None

    def step(self, one: Running) -> str:
        """How the piece ended: ok, failed or timeout; empty while it runs."""
        code, seconds = one.process.poll(), self.machine.now() - one.began
        if code is None and seconds < one.limit:
            return ""
        if code is None:
            one.process.kill()
            status, reason = "timeout", f"stopped after {one.limit:.0f} s"
        elif code < 0:
            status, reason = "failed", f"killed by signal {-code}"
        else:
            status, reason = ("failed", f"exit status {code}") if code else ("ok", "")
        self.ended(one.piece, status, seconds, reason, one.process.tail() if reason else "")
        return status

    def ended(self, piece: Piece, status: str, seconds: float, reason: str = "", output: str = "") -> None:
        self.line(
            piece=piece.name,
            event="end",
            status=status,
            seconds=round(seconds, 1),
            reason=reason,
            output=output,
        )
