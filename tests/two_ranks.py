"""Runs functions on two ranks of gloo, in forks of one process that has imported what they need."""

import datetime
import importlib.util
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from warm import python

SIZE = 2


def on_two_ranks(functions, folder: Path) -> None:
    """Each of ``functions(folder)``, of one test file, on two ranks at once; AssertionError with their tracebacks."""
    (file,) = {function.__code__.co_filename for function in functions}
    names = [function.__name__ for function in functions]
    done = subprocess.run(
        [*python(), "-W", "ignore", __file__, file, str(folder), *names],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def rank(number: int, module, folder: Path, names: list[str]) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(SIZE),
    }  # as torchrun sets them
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=number,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=60),
    )
    for name in names:
        try:
            torch.manual_seed(0)
            getattr(module, name)(folder)
            torch.distributed.barrier()
        except BaseException:
            print(f"rank {number}, {name}:\n{traceback.format_exc()}", flush=True)
            os._exit(1)
    torch.distributed.destroy_process_group()


def main(file: str, folder: str, *names: str) -> None:
    import torch.distributed.fsdp
    import torch.distributed.tensor

    spec = importlib.util.spec_from_file_location("checks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.multiprocessing.start_processes(
        rank, (module, Path(folder), list(names)), SIZE, start_method="fork"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
