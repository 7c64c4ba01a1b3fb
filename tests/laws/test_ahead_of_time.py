"""Law 7: every shipped Triton configuration compiles for sm_80, sm_90 and sm_100 without a GPU.

Run as a program, this file compiles the configurations for one architecture, through the launchers as they stand, and
prints what came out. It needs a process of its own: other tests may have triton in its interpreter.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ARCHITECTURES = [80, 89, 90, 100]
# Bytes of shared memory a program can have; from NVIDIA's tuning guides.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


def configurations(arch: int):
    """(name, launch's arguments): every entry of the tile tables and, for sm_90, other masks and every term at once.

    For sm_89 the widest: what they are refused for is shared memory.
    """
    for dtype in ("bfloat16", "float32"):
        for width in (64, 128, 256) if arch != 89 else (128, 256) if dtype == "bfloat16" else (256,):
            yield f"attention {dtype} {width}", {"dtype": dtype, "key_width": width, "width": width}
            if width == (128 if arch == 89 else 64) or (arch == 90 and width == 128):
                energy = {"energy": True, "causal": width == 64}
                yield f"energy {dtype} {width}", {"dtype": dtype, "key_width": width, "width": width} | energy
    yield (
        "attention bfloat16 128 window",
        {"dtype": "bfloat16", "key_width": 128, "width": 128, "window": 100},
    )
    for dtype, width in (("bfloat16", 64), ("bfloat16", 128), ("float32", 64)):
        if arch == 90 or width == 128:
            yield f"ragged {dtype} {width}", {"dtype": dtype, "width": width, "ranks": [13, 32]}
    for dtype, width in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 128)):
        if arch == 90 or width == 128:
            yield f"combine {dtype} {width}", {"dtype": dtype, "width": width}
    if arch == 90:
        for dtype, width in (("bfloat16", 64), ("bfloat16", 256), ("float32", 128)):
            window = {"dtype": dtype, "width": width, "window": 100}
            yield f"attention {dtype} {width} window", window | {"key_width": width}
            if width > 64:
                yield f"combine {dtype} {width} window", window
        for key_width, width in ((16, 64), (96, 256)):  # scores of low rank
            yield f"attention bfloat16 {key_width} {width}", {
                "dtype": "bfloat16", "key_width": key_width, "width": width}  # fmt: skip
        yield "combine bfloat16 100", {"dtype": "bfloat16", "width": 100}
        yield "attention float16 32 64, every key", {
            "dtype": "float16", "key_width": 32, "width": 64, "causal": False}  # fmt: skip
        yield "attention bfloat16 64 128, all terms, GQA, packed", {
            "dtype": "bfloat16", "key_width": 64, "width": 128, "groups": 1, "packed": True, "terms": True}  # fmt: skip

    for batch in (1, 16, 256) if arch != 89 else (1,):
        yield f"packed bfloat16, batch {batch}", {"dtype": "bfloat16", "batch": batch}
    if arch == 90:
        yield "packed float16, float32 rows, batch 16", {"dtype": "float16", "batch": 16, "rows": "float32"}
        yield "packed float16, batch 1", {"dtype": "float16", "batch": 1}


def launch_packed(dtype, batch, rows=None):
    """The product with packed weights, split over K where the batch is small."""
    import torch

    from gaugekit.ops.packed_linear_weight import empty_weight
    from gaugekit.triton_kernels.packed_linear import packed_linear

    x = torch.empty(batch, 4096, dtype=getattr(torch, rows or dtype))
    packed = empty_weight(1024, 4096, getattr(torch, dtype))
    packed_linear(torch.empty(batch, 1024, dtype=x.dtype), x, *packed[:5], torch.empty(1024, dtype=x.dtype))


def launch(
    dtype, width, key_width=0, groups=2, causal=True, window=None, packed=False, terms=False, energy=False,
    ranks=None,
):  # fmt: skip
    """Forward with every term, and backward, on operands that are never read.

    The backward pass of an attention gets β alone unless ``terms``: the sweep for the others is the combine's.
    """
    import torch

    from gaugekit.triton_kernels.nonlocal_energy import nonlocal_energy, nonlocal_energy_backward
    from gaugekit.triton_kernels.ragged_attention import ragged_attention
    from gaugekit.triton_kernels.ragged_attention_backward import ragged_attention_backward
    from gaugekit.triton_kernels.shaped_attention import shaped_attention
    from gaugekit.triton_kernels.shaped_attention_backward import shaped_attention_backward
    from gaugekit.triton_kernels.shaped_combine import shaped_combine
    from gaugekit.triton_kernels.shaped_combine_backward import shaped_combine_backward

    def rows(heads, columns):
        return torch.empty(1, heads, 2048, columns, dtype=getattr(torch, dtype))

    bounds = torch.tensor([0, 100, 2048], dtype=torch.int32) if packed else None
    a, v, v0, gain = rows(2, width), rows(groups, width), rows(groups, width), torch.ones(2)
    every, mask = (gain, gain, gain, v0, gain), (causal, window, None, None, bounds)
    if ranks:
        lse, (q, k) = torch.empty(1, 2, 2048), (rows(1, sum(ranks))[:, 0] for _ in range(2))
        ragged_attention(q, k, v, ranks, *mask, 0.125, a, lse)
        ragged_attention_backward(a, q, k, v, a, lse, ranks, *mask, 0.125, q, k, v)
        return
    if not key_width:
        shaped_combine(a, a, v, *every, *mask)
        shaped_combine_backward(a, a, v, *every, *mask, da=a, dv=a, dv0=a)
        return
    q, k, lse = rows(2, key_width), rows(groups, key_width), torch.empty(1, 2, 2048)
    if energy:
        nonlocal_energy(v, q, k, lse, causal, None, 0.125, lse, lse, a)
        nonlocal_energy_backward(lse, lse, v, q, k, lse, lse, a, causal, None, 0.125, False, a, q, k)
        return
    shaped_attention(q, k, v, *every, *mask, 0.125, a, a, lse)
    some = every if terms else (None, gain, None, None, None)
    shaped_attention_backward(a, q, k, v, a, lse, *some, *mask, 0.125, q, k, v, a if terms else None)


def compile_all(arch: int) -> None:
    """Compiles instead of launching, and prints one JSON line a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    from gaugekit.triton_kernels import (
        ragged_attention,
        ragged_attention_backward,
        shaped_attention,
        shaped_attention_backward,
    )

    class Driver:
        """Answers what triton asks of a GPU before it compiles."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Driver())
    run, kernels = triton.JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    triton.JITFunction.run = compile_only
    for module in (shaped_attention, shaped_attention_backward, ragged_attention, ragged_attention_backward):
        module.small = lambda x: SHARED[arch] < SHARED[80]
    for name, operands in configurations(arch):
        (launch_packed if "batch" in operands else launch)(**operands)
        for kernel, compiled in kernels:
            row = {"case": name, "kernel": kernel, "shared": compiled.metadata.shared}
            print(json.dumps(row | (instructions(compiled.asm["cubin"]) if arch == 90 else {})), flush=True)
        kernels.clear()


def instructions(cubin: bytes) -> dict:
    """Spills and tensor-core products in the machine code, counted with the disassembler that triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return {"spills": len(re.findall(r"\b(?:STL|LDL)\b", text)), "hgmma": len(re.findall(r"\bHGMMA\b", text))}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """architecture -> rows, made when first asked for."""
    cache = tmp_path_factory.mktemp("triton")

    @functools.cache
    def rows(arch):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"sm_{arch}: {run.stdout[-1000:]}{run.stderr[-4000:]}"
        return [json.loads(line) for line in run.stdout.splitlines()]

    return rows


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (gaugekit[triton])"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_compiles_and_fits(compiled, arch):
    assert {row["case"] for row in compiled(arch)} == {name for name, _ in configurations(arch)}
    assert {row["kernel"] for row in compiled(arch)} == {
        "_shaped_combine_sums", "_shaped_combine_fwd", "_shaped_combine_bwd",
        "_shaped_attention_fwd", "_shaped_attention_bwd_kv", "_shaped_attention_bwd_q",
        "_packed_linear", "_packed_linear_total",
        "_nonlocal_energy_fwd", "_nonlocal_energy_bwd_kv", "_nonlocal_energy_bwd_q",
        "_ragged_attention_fwd", "_ragged_attention_bwd_kv", "_ragged_attention_bwd_q",
    }  # fmt: skip
    too_large = [row for row in compiled(arch) if row["shared"] > SHARED[arch]]
    assert not too_large, too_large


def triton_is_3_6() -> bool:
    return version("triton").startswith("3.6.")


def test_no_spills_on_sm_90(compiled):
    if not triton_is_3_6():
        pytest.skip("registers are allotted for triton 3.6; other versions need only compile")
    spilled = [row for row in compiled(90) if row["spills"]]
    assert not spilled, spilled


def test_sixteen_bit_products_run_on_the_tensor_cores(compiled):
    if not triton_is_3_6():
        pytest.skip("HGMMA is asserted for triton 3.6; other versions need only compile")
    products = [
        row
        for row in compiled(90)
        if row["kernel"] != "_packed_linear_total"
        and "_combine" not in row["kernel"]
        and "float32" not in row["case"]
        and (row["kernel"] != "_packed_linear" or row["case"] == "packed bfloat16, batch 256")
    ]  # packed products of 16 rows and fewer wait for memory, and a tensor core of this kind takes 64 rows
    assert products and all(row["hgmma"] for row in products), [row for row in products if not row["hgmma"]]


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
