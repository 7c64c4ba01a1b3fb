"""Every test runs deterministic and poisoned: memory that an operator allocates and forgets to write holds NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA GPU (make gpu runs it)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(absent)
