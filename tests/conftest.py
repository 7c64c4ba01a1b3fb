"""Every test runs deterministic and poisoned: memory that an operator allocates and forgets to write holds NaN."""

import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # more threads than cores wait for each other; child processes inherit this
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))
    torch.set_num_threads(int(threads))
    # two processes that compile the same header at the same time spoil it for each other
    name = f"gaugekit-inductor-{os.getuid()}-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), name))


@pytest.fixture(autouse=True)
def deterministic_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# A worker takes a file at a time, for its fixtures; but these files' tests share none and are long,
EACH_ALONE = (
    "tests/test_docs.py", "tests/test_examples.py", "tests/models/test_kin.py", "tests/models/test_encoders.py",
    "tests/models/test_vision.py", "tests/models/test_encoder_decoders.py",
    "tests/laws/test_ahead_of_time_cuda.py", "tests/triton_kernels/test_interpreter.py",
)  # fmt: skip
# and these share one that is (the program of the fuzzer is compiled once).
TOGETHER = {"tests/codec/test_fuzz.py": "tests/codec/test_damage.py"}


def pytest_collection_finish(session):
    """What was imported lives until the end: verify's collections, three a call, need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return nodeid if file in EACH_ALONE else TOGETHER.get(file, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: item.path not in slow
    )  # long ones first: no worker ends long after the others
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA GPU (make gpu runs it)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(absent)
