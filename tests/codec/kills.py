"""Kills a packing process at random points, again and again, and sees that nothing is damaged or lost.

    python tests/codec/kills.py SOURCE TARGET KILLS [SEED]

SOURCE is a directory with .safetensors files. Each run is a fork of this process, which never codes anything itself, so
that no run waits for an import. A run that ends before its kill is not counted; its result is compared and removed.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import gaugekit as gk
from gaugekit.files.staging import LOCK, MANIFEST


def start(source: Path, target: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        gk.codec.pack(source, target)
        status = 0
    finally:
        os._exit(status)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the two that a kill just after the rename leaves."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (MANIFEST, LOCK)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finish(source: Path, target: Path) -> float:
    began = time.perf_counter()
    assert os.waitpid(start(source, target), 0)[1] == 0, "a run that is left alone finishes"
    return time.perf_counter() - began


def main(source: Path, target: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    given = digest(source)
    seconds = finish(source, target)
    whole = digest(target)
    shutil.rmtree(target)
    killed = completed = 0
    while killed < kills:
        process = start(source, target)
        time.sleep(chance.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            killed += 1
        if target.exists():
            assert digest(target) == whole, "what has the target's name is whole"
            finish(source, target) if (target / MANIFEST).exists() else None
            shutil.rmtree(target)
            completed += 1
    finish(source, target)
    assert digest(target) == whole and digest(source) == given
    assert not {MANIFEST, LOCK} & set(os.listdir(target))
    print(f"{killed} kills, {completed} results between them, {seconds:.1f} s a run left alone: all whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int((sys.argv[4:] or ["0"])[0]))
