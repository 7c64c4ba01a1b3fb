"""What this machine is and the most it does: versions, a large copy, a large product of random matrices."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
from pathlib import Path

import torch
import triton

import gpu_ledger as ledger

COPY_BYTES = 4 << 30
PRODUCT_WIDTH = 8192
REPEATS = 10


def milliseconds(call) -> float:
    """The median of ``REPEATS`` calls, after three that warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def main(measures: Path) -> None:
    card = torch.cuda.get_device_properties()
    about = {
        "machine": card.name,
        "commit": os.environ.get("GAUGEKIT_COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
    }
    ledger.append(
        measures,
        about
        | {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        | {"multiprocessors": card.multi_processor_count, "cache_bytes": card.L2_cache_size},
    )
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    ledger.append(measures, {"ceiling": "copy, read and written", "TB_s": 2 * COPY_BYTES / copy / 1e9})
    a, b = (torch.randn(PRODUCT_WIDTH, PRODUCT_WIDTH, device="cuda").bfloat16() for _ in range(2))
    product = milliseconds(lambda: a @ b)
    ledger.append(
        measures, {"ceiling": "bfloat16 product, random", "TFLOP_s": 2 * PRODUCT_WIDTH**3 / product / 1e9}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
