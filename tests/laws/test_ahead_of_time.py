"""Law 7: one launch a kernel and specialisation compiles for sm_90 without a GPU, spills nothing, uses tensor cores.

What the tests and benches launch, and other architectures, are compiled by launches.py (``make gpu-dry``). It needs a
process of its own: other tests may have triton in its interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PROGRAM = FOLDER / "launches.py"
KERNELS = {
    "_shaped_combine_sums", "_shaped_combine_fwd", "_shaped_combine_bwd",
    "_shaped_attention_fwd", "_shaped_attention_bwd_kv", "_shaped_attention_bwd_q",
    "_packed_linear", "_packed_linear_total",
    "_nonlocal_energy_fwd", "_nonlocal_energy_bwd_kv", "_nonlocal_energy_bwd_q",
    "_ragged_attention_fwd", "_ragged_attention_bwd_kv", "_ragged_attention_bwd_q",
}  # fmt: skip
WITH_SUMS = ("_shaped_combine_fwd", "_shaped_combine_bwd", "_shaped_attention_fwd")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (gaugekit[triton])"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What launches.py reports of the representatives on sm_90; it fails by itself for what law 7 forbids."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ["record", "--of", "representatives"],
        ["compile", "--report", str(folder / "rows.jsonl")],
    ):
        command = [sys.executable, str(PROGRAM), arguments[0], str(folder / "launches.jsonl"), *arguments[1:]]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if arguments[0] == "record":
            assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return found, run


def triton_is_3_6() -> bool:
    return version("triton").startswith("3.6.")


def test_every_kernel_compiles_and_fits(rows):
    rows, run = rows
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [row for row in rows if "error" in row], run.stdout[-6000:]
    for kernel in WITH_SUMS:  # with sums of chunks, and where one chunk is enough
        assert {
            "SUMS" in row["types"] for row in rows if row["kernel"] == kernel and "GAMMA" in row["types"]
        } == {
            True,
            False,
        }, kernel
    if triton_is_3_6():  # registers and shared memory are allotted for it; other versions need only compile
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_sixteen_bit_products_run_on_the_tensor_cores(rows):
    if not triton_is_3_6():
        pytest.skip("HGMMA is asserted for triton 3.6; other versions need only compile")
    products = [
        row
        for row in rows[0]
        if row["kernel"] != "_packed_linear_total"
        and "_combine" not in row["kernel"]
        and "fp32" not in (row["types"].get("Q"), row["types"].get("X"))
        and (row["kernel"] != "_packed_linear" or row["constants"]["BLOCK_M"] >= 64)
    ]  # packed products of 16 rows and fewer wait for memory, and a tensor core of this kind takes 64 rows
    assert products and all(row["hgmma"] for row in products), [row for row in products if not row["hgmma"]]
