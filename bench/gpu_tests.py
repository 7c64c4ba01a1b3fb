"""A plugin of pytest: one JSON line a test the moment it ends, and a first look at one test a kernel and width.

``GAUGEKIT_TEST_LINES`` names the file. ``GAUGEKIT_TEST_SMOKE=1`` keeps, of every test function, its first bf16 and its
first other case, and every test of a CUDA file. ``GAUGEKIT_TEST_AS_GPU=1`` has tests collected as where a GPU is: it is
for listing them alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import gpu_ledger as ledger

# Operators in csrc/cuda have their tests in these files.
CUDA_FILES = (
    "test_device.py",
    "test_transfer.py",
    "test_packed_linear_rows.py",
    "test_single_cache_attention_rows.py",
)

if os.environ.get("GAUGEKIT_TEST_AS_GPU") == "1":
    import torch

    torch.cuda.is_available = lambda: True


def of_smoke(names: list[tuple[str, str]]) -> list[bool]:
    """For each test (file, name with its case) whether it is in the first look."""
    seen, kept = set(), []
    for file, name in names:
        function = name.split("[", 1)[0]
        key = (file, function, "bfloat16" in name)
        kept.append(Path(file).name in CUDA_FILES or key not in seen)
        seen.add(key)
    return kept


def pytest_collection_modifyitems(config, items):
    if os.environ.get("GAUGEKIT_TEST_SMOKE") != "1":
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    kept = of_smoke([(str(item.path), item.name) for item in on_gpu])
    items[:] = [item for item, keep in zip(on_gpu, kept, strict=True) if keep]


class Lines:
    """Where the tests are run from, so not in the processes that run them for it."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        # A test is its call, unless setting it up skipped it or went wrong, or leaving it did.
        if (report.when != "call" and report.outcome == "passed") or (
            report.when == "teardown" and report.skipped
        ):
            return
        error = report.failed and report.when != "call"
        self.write(report.nodeid, "error" if error else report.outcome, report.duration, report)

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report.nodeid, "error", 0.0, report)

    def write(self, test: str, outcome: str, seconds: float, report) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2)}
        if outcome != "passed":
            text = str(report.longrepr).strip().splitlines()
            wrong = [part[1:].strip() for part in text if part.startswith("E ")]
            line["reason"] = (wrong or text[-1:] or [""])[0][:300]
        ledger.append(self.path, line | {"commit": os.environ.get("GAUGEKIT_COMMIT", "unknown")})


def pytest_configure(config):
    path = os.environ.get("GAUGEKIT_TEST_LINES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Lines(Path(path)), "gaugekit-lines")
