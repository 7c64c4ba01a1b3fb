"""Law 7: one launch a kernel and specialisation compiles for sm_90 without a GPU, spills nothing, uses tensor cores.

What the tests and benches launch, and other architectures, are compiled by launches.py (``make gpu-dry``). It needs a
process of its own: other tests may have triton in its interpreter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import machine_code
import triton_sources

FOLDER = Path(__file__).parent
PROGRAM = FOLDER / "launches.py"
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
    return (
        [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()],
        run,
        folder / "cache",
    )


def triton_is_3_6() -> bool:
    return version("triton").startswith("3.6.")


def test_products_are_seen_through_what_a_kernel_calls():
    """_shaped_attention_fwd comes to its tl.dot by two calls; a sum of parts multiplies nothing."""
    assert "_attend" in triton_sources.functions() and "_attend" not in triton_sources.launched()
    assert triton_sources.multiplies("_shaped_attention_fwd")
    assert not triton_sources.multiplies("_packed_linear_total")


def test_every_kernel_compiles_and_fits(rows):
    rows, run, _ = rows
    compiled = {row["kernel"] for row in rows}
    missing = sorted(triton_sources.launched() - compiled)
    assert not missing, f"configurations.representatives() launches no {', '.join(missing)}"
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
        row for row in rows[0] if triton_sources.multiplies(row["kernel"]) and takes_64_rows_of_16_bits(row)
    ]
    assert products and all(row["hgmma"] for row in products), [row for row in products if not row["hgmma"]]


def takes_64_rows_of_16_bits(row: dict) -> bool:
    """Whether a tensor core of this kind fits: it takes 64 rows. Packed products of 16 and fewer wait for memory, as
    decoding from one cache does, and the sums of a combine are products with a mask, in tiles that fit its sweep.
    """
    if (
        "fp32" in (row["types"].get("Q"), row["types"].get("X"), row["types"].get("F"))
        or "_combine" in row["kernel"]
    ):
        return False
    few = ("_packed_linear", "_single_cache_attention_fwd")
    return row["kernel"] not in few or row["constants"]["BLOCK_M"] >= 64


LOCAL = """\
.version 8.0
.target sm_90a
.address_size 64
.visible .entry probe(.param .u64 out) {
  .local .align 4 .b8 room[64];
  .reg .b64 %place, %index, %here; .reg .b32 %x;
  ld.param.u64 %place, [out]; cvt.u32.u64 %x, %place; and.b32 %x, %x, 60; cvt.u64.u32 %index, %x;
  mov.u64 %here, room; add.s64 %here, %here, %index;
  st.local.u32 [%here], %x; st.local.u32 [room+8], %x; ld.local.u32 %x, [%here]; st.global.u32 [%place], %x;
  ret;
}
"""


def test_instructions_are_counted_as_the_disassembler_names_them(rows, tmp_path):
    if not triton_is_3_6():
        pytest.skip("the numbers of instructions are read off programs of triton 3.6's assembler")
    (tmp_path / "local.ptx").write_text(LOCAL)
    local = tmp_path / "local.cubin"
    assemble = [machine_code.tools() / "ptxas", "-arch=sm_90a", tmp_path / "local.ptx", "-o", local]
    subprocess.run(assemble, check=True)
    for path in (local, *sorted(rows[2].glob("*/_ragged_attention_bwd_q.cubin"))):
        command = [machine_code.tools() / "nvdisasm", "-c", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counts = machine_code.describe(path.read_bytes())
        assert counts["spills"] == len(re.findall(r"\b(?:STL|LDL)\b", text))
        assert counts["hgmma"] == len(re.findall(r"\bHGMMA\b", text))
        assert bool(counts["spills"]) == (path == local) == (not counts["hgmma"])
