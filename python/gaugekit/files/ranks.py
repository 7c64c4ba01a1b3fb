"""The processes of one ``torchrun`` call that share a job: what each is to do, what each has done, and what stops all.

They meet in the key-value store of torch.distributed, and on a disk that all of them see. Rank 0 leads: it checks what
it is asked, holds the lock of the place of work, keeps the manifest, and publishes. The others do what it hands out.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

PATIENCE = 300.0  # seconds without a sign of life until a rank counts as gone: some writes let no thread run
BEAT = 2.0  # seconds between two signs of life
PAUSE = 0.02  # seconds between two looks at the store


def torchrun() -> tuple[int, int]:
    """(rank, how many) of the processes that ``torchrun`` started this one among; (0, 1) where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class RankFailed(OSError):
    """Another rank could not go on, or is gone. ``kinds`` names the class of its error and those above it."""

    def __init__(self, message: str, kinds: Iterable[str] = ()):
        super().__init__(message)
        self.kinds = tuple(kinds)


class Ranks:
    """Process ``rank`` of ``size`` that share a job, as a context in which the job is done.

    An error of one reaches all: each raises ``RankFailed`` the next time it looks (``check``, ``hear``, ``news``), or
    after ``patience`` seconds without a sign of life of a rank it waits for. ``store`` is torch.distributed's; values
    are JSON. Nothing that was received is ever run or unpickled.
    """

    def __init__(self, rank: int, size: int, store: Any, patience: float = PATIENCE):
        self.rank, self.size, self.patience = rank, size, patience
        self._store, self._seen, self._over = store, 0, threading.Event()
        self._heart = threading.Thread(target=self._beat, name="gaugekit-rank", daemon=True)

    @classmethod
    def of_torchrun(cls) -> Ranks | None:
        """The ranks that ``torchrun`` started this process among; None where it started one alone, or did not."""
        if torchrun()[1] < 2:
            return None
        from torch.distributed import rendezvous

        store, rank, size = next(iter(rendezvous("env://")))
        return cls(rank, size, store)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        self._heart.start()
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        with contextlib.suppress(RankFailed):
            if error is not None:
                self._fail(error)
            if self.leads:
                self.tell("closed", True)
                if error is None:
                    self._others_left()
            else:
                self.tell(f"left {self.rank}", True)
                if error is not None:  # torchrun ends all once one has ended so: rank 0 has to tidy up first
                    self._wait(lambda: self._has("closed"), {0}, heedless=True)
        self._over.set()
        self._heart.join()

    @contextlib.contextmanager
    def leading(self, hopeless: type[Exception]) -> Iterator[None]:
        """Around rank 0's work: after an error the others have stopped writing when this is left.

        What another rank failed of is raised as ``hopeless`` where it was such an error there.
        """
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(RankFailed):
                self._fail(error)
                self._others_left()
            if isinstance(error, RankFailed) and hopeless.__name__ in error.kinds:
                raise hopeless(str(error)) from None
            raise

    def tell(self, key: str, value: Any) -> None:
        """Lets every rank hear ``value`` (JSON) under ``key``."""
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def hear(self, key: str, of: int = 0) -> Any:
        """What rank ``of`` tells under ``key``, once it does."""
        self._wait(lambda: self._has(key), {of})
        return self._value(key)

    def report(self, value: Any) -> None:
        """Puts ``value`` (JSON) among the news."""
        number = self._ask(lambda: self._store.add("reports", 1))
        self.tell(f"report {number}", value)

    def news(self, wait_for: Iterable[int] = ()) -> list[Any]:
        """The reports since the last call, by their age; at least one where ranks are given to ``wait_for``."""
        if waited := set(wait_for):
            self._wait(lambda: self._ask(lambda: self._store.add("reports", 0)) > self._seen, waited)
        self.check()
        count = self._ask(lambda: self._store.add("reports", 0))
        first, self._seen = self._seen + 1, count
        return [self.hear(f"report {number}") for number in range(first, count + 1)]

    def check(self) -> None:
        """RankFailed where a rank could not go on."""
        if self._has("failed"):
            failure = self._value("failed")
            raise RankFailed(f"rank {failure['rank']}: {failure['message']}", failure["kinds"])

    @contextlib.contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """One rank after the other, rank 0 first."""
        if self.rank:
            self.hear(f"{name} {self.rank - 1}", self.rank - 1)
        yield
        self.tell(f"{name} {self.rank}", True)

    def shares(self, sizes: Mapping[str, int]) -> list[list[str]]:
        """The names in ``sizes`` as one list a rank, about as large in all, each in the order given."""
        totals, share = [0] * self.size, {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            share[name] = totals.index(min(totals))
            totals[share[name]] += sizes[name]
        return [[name for name in sizes if share[name] == rank] for rank in range(self.size)]

    def _fail(self, error: BaseException) -> None:
        """Tells all of ``error``; where another failed before, that one stands."""
        kinds = [kind.__name__ for kind in type(error).__mro__]
        message = str(error) or type(error).__name__
        failure = json.dumps({"rank": self.rank, "message": message, "kinds": kinds})
        self._ask(lambda: self._store.compare_set("failed", "", failure))

    def _others_left(self) -> None:
        for rank in range(1, self.size):
            with contextlib.suppress(RankFailed):  # it is gone, and writes no more
                self._wait(lambda key=f"left {rank}": self._has(key), {rank}, heedless=True)

    def _wait(self, ready: Callable[[], bool], of: set[int], heedless: bool = False) -> None:
        """Until ``ready``; RankFailed where a rank failed (not where ``heedless``), or one of ``of`` is gone."""
        beats: dict[int, tuple[int, float]] = {}
        while not ready():
            if not heedless:
                self.check()
            now = time.monotonic()
            for rank in of - {self.rank}:
                count = self._ask(lambda key=f"alive {rank}": self._store.add(key, 0))
                if rank not in beats or beats[rank][0] != count:
                    beats[rank] = count, now
                elif now - beats[rank][1] > self.patience:
                    raise RankFailed(f"rank {rank}: no sign of life for {self.patience:.0f} seconds")
            time.sleep(PAUSE)

    def _beat(self) -> None:
        with contextlib.suppress(RankFailed):
            while True:
                self._ask(lambda: self._store.add(f"alive {self.rank}", 1))
                if self._over.wait(min(BEAT, self.patience / 4)):
                    return

    def _has(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([key]))

    def _value(self, key: str) -> Any:
        return json.loads(self._ask(lambda: self._store.get(key)))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # torch's errors of the network
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise RankFailed(f"the store of torch.distributed does not answer: {reason}") from error
