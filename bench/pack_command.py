"""``gaugekit pack`` and ``unpack`` as whole commands, Python's start and the flush to the disk included, beside zstd.

    python bench/pack_command.py            # 1.07 GB of bfloat16 in four files, nine rounds: a minute or two
    python bench/pack_command.py --quick    # 67 MB, three rounds
    python bench/pack_command.py --save

Normal numbers. The rival is ``tar | zstd -3`` on as many threads as there are cores, ``zstd -d | tar`` back, and a
flush of what that wrote. Before each call what the last one of its kind wrote is removed and the disk is waited for;
the source is in the system's cache. Calls take turns; no round is left out, since a flush is the work of the system's
own threads, which nobody can tell from others'. ``peak_bytes`` is the command's resident memory.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gaugekit.files.durable import sync, sync_files
from host_rows import quantiles
from run import commit, machine, save, table

FILES, ROUNDS = 4, 9
COMMAND = [sys.executable, "-m", "gaugekit"]
CORES = len(os.sched_getaffinity(0))
BASELINES = {"pack": f"tar | zstd -3 -T{CORES}", "unpack": "zstd -d | tar"}


def write_source(folder: Path, file_bytes: int) -> None:
    """A directory like a model's."""
    folder.mkdir()
    for number in range(FILES):
        generator = torch.Generator().manual_seed(number)
        parts = [torch.randn(file_bytes // 16, generator=generator).mul(0.02).bfloat16() for _ in range(8)]
        tensors = {f"layer.{number}.{i}": part.view(-1, 1024) for i, part in enumerate(parts)}
        save_file(tensors, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text("{}")


def gaugekit(verb: str, source: Path, target: Path) -> None:
    subprocess.run([*COMMAND, verb, source, target], stdout=subprocess.DEVNULL, check=True)


def memory(verb: str, source: Path, target: Path) -> int:
    """Bytes that the command takes; asked of a small process, since a child begins with what its parent holds."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, verb, source, target],
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(done.stdout)


def compress(source: Path, target: Path) -> None:
    pipe = 'set -o pipefail; tar cf - -C "$0" . | zstd -q -3 -T"$2" -f -o "$1"'
    subprocess.run(["bash", "-c", pipe, source, target, str(CORES)], check=True)
    sync(target)
    sync(target.parent)


def decompress(source: Path, target: Path) -> None:
    target.mkdir()
    pipe = 'set -o pipefail; zstd -q -dc "$0" | tar xf - -C "$1"'
    subprocess.run(["bash", "-c", pipe, source, target], check=True)
    sync_files(target)
    sync(target)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.sync()


def check(source: Path, *restored: Path) -> None:
    for folder in restored:
        for path in source.iterdir():
            assert filecmp.cmp(path, folder / path.name, shallow=False), f"{folder / path.name} differs"


def seconds(call: Callable[[], object], target: Path) -> float:
    remove(target)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(folder: Path, rounds: int) -> list[dict]:
    """A row for each of the two verbs."""
    source, packed, ours = folder / "source", folder / "packed", folder / "restored"
    tarred, theirs = folder / "source.tar.zst", folder / "untarred"
    calls = {
        ("pack", "ours"): (lambda: gaugekit("pack", source, packed), packed),
        ("pack", "theirs"): (lambda: compress(source, tarred), tarred),
        ("unpack", "ours"): (lambda: gaugekit("unpack", packed, ours), ours),
        ("unpack", "theirs"): (lambda: decompress(tarred, theirs), theirs),
    }
    taken = {"pack": memory("pack", source, packed), "unpack": memory("unpack", packed, ours)}
    compress(source, tarred)
    decompress(tarred, theirs)
    check(source, ours, theirs)
    times: dict[tuple, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for verb in ("pack", "unpack"):
            for who in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                times[verb, who].append(seconds(*calls[verb, who]))
    before = sum(path.stat().st_size for path in source.iterdir())
    after = sum(path.stat().st_size for path in packed.iterdir())
    sizes = {"bytes_before": before, "coded_bytes": after, "coded_bytes_zstd": tarred.stat().st_size}
    return [row(verb, times, taken[verb], sizes) for verb in ("pack", "unpack")]


def row(verb: str, times: dict, peak_bytes: int, sizes: dict) -> dict:
    ours, theirs = times[verb, "ours"], times[verb, "theirs"]
    p20, median, p80 = (1e3 * q for q in quantiles(ours))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return {
        "op": "pack_command",
        "shape": f"{verb}, {FILES} files, {sizes['bytes_before'] / 1e9:.2f} GB",
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": CORES,
        "label": "whole command, onto the disk",
        "baseline": BASELINES[verb],
        "absent": False,
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "baseline_ms": 1e3 * statistics.median(theirs),
        "ratio": ratio,
        "ratio_all_rounds": ratio,
        "share_of_peak": None,
        "peak_bytes": peak_bytes,
        "without_us": ratio,
        "rounds": len(ours),
        "rounds_disturbed": 0,
        "baseline_least_ms": 1e3 * min(theirs),
        "baseline_most_ms": 1e3 * max(theirs),
        "least_ms": 1e3 * min(ours),
        "most_ms": 1e3 * max(ours),
        **sizes,
        "machine": machine("cpu"),
        "commit": commit(),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="67 MB, three rounds")
    options.add_argument("--rounds", type=int, help=f"default {ROUNDS}")
    options.add_argument(
        "--folder", help="on the disk to measure (default: the system's folder for temporary files)"
    )
    options.add_argument("--json", action="store_true", help="rows as JSON")
    options.add_argument("--save", action="store_true", help="keep the rows under bench/results/")
    arguments = options.parse_args()
    if missing := [name for name in ("tar", "zstd", "bash") if shutil.which(name) is None]:
        options.error(f"expected {', '.join(missing)} on PATH, got none")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_source(Path(folder, "source"), (1 << 24) if arguments.quick else 1 << 28)
        rows = measure(Path(folder), arguments.rounds or (3 if arguments.quick else ROUNDS))
    print(json.dumps(rows) if arguments.json else table(rows))
    if arguments.save:
        print(save(rows, "pack_command", "cpu"))


if __name__ == "__main__":
    main()
