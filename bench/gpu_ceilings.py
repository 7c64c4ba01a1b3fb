"""What this machine is and the most it does: versions, a large copy, a large product of random matrices."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path

import torch
import triton

import gpu_ledger as ledger
from backends import CudaBackend
from device_rows import peaks


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
    limits = peaks("bfloat16", CudaBackend(), {})
    copy, product = limits["copy_bytes_per_second"], limits["product_flops_per_second"]
    ledger.append(measures, {"ceiling": "copy, read and written", "TB_s": copy / 1e12})
    ledger.append(measures, {"ceiling": "bfloat16 product, random", "TFLOP_s": product / 1e12})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
