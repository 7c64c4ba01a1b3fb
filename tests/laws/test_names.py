"""Law 1: every stem stands in each folder it should, or in the table of reasons; no file without a stem."""

import ast
from pathlib import Path

import pytest
from setuptools import find_packages

OPERATORS = [
    "shaped_combine",
    "shaped_attention",
    "packed_linear",
    "nonlocal_energy",
    "ragged_attention",
    "gauge_linear",
    "single_cache_attention",
]
CODES = ["rans", "canonical_qr", "bitsback"]

FOLDERS = {
    "reference": "python/gaugekit/reference/{stem}.py",
    "ops": "python/gaugekit/ops/{stem}/operator.py",
    "cpu": "csrc/cpu/{stem}.cpp",
    "cuda": "csrc/cuda/{stem}.cu",
    "triton": "triton_kernels/{stem}.py",
    "tests": "tests/ops/test_{stem}.py",
    "bench": "bench/ops/bench_{stem}.py",
}

ABSENT = {
    (
        "shaped_combine",
        "cuda",
    ): "memory-bound sweep: Triton reaches the bandwidth, so no CUDA twin is planned",
    ("shaped_attention", "cpu"): "its softmax core is torch's SDPA and the rest is shaped_combine",
    ("shaped_attention", "cuda"): "planned in Triton only",
    ("ragged_attention", "cuda"): "planned in Triton only",
    ("gauge_linear", "cuda"): "one product with a gather, which Triton runs on the tensor cores",
    (
        "nonlocal_energy",
        "cpu",
    ): "its softmax core is torch's SDPA, with one more column; the rest is one product",
    ("nonlocal_energy", "cuda"): "planned in Triton only",
    ("rans", "triton"): "a state machine on integers, planned in CUDA only",
    (
        "canonical_qr",
        "cuda",
    ): "float64 in one order of roundings: part of the recovery of bitsback, which stays on the CPU",
    ("canonical_qr", "triton"): "one chain of fused multiply-adds an element: Triton does not fix its order",
    (
        "bitsback",
        "cuda",
    ): "a chain of D columns, each waiting for corrections from one stack: a model's rotations take two CPU cores"
    " minutes, once, and a second code with the same bits would have to be proved on every GPU",
    ("bitsback", "triton"): "a state machine on integers, and the reason of canonical_qr",
}

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stem", OPERATORS + CODES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_stem_stands_in_its_folder_or_has_a_reason(stem, folder):
    path = ROOT / FOLDERS[folder].format(stem=stem)
    if (stem, folder) in ABSENT:
        assert not path.exists(), f"{path.name} exists: take ({stem}, {folder}) out of ABSENT"
    else:
        assert path.exists(), f"{path.relative_to(ROOT)} is missing and ABSENT gives no reason"


def test_no_folder_without_a_stem():
    folders = {
        path.name
        for path in (ROOT / "python" / "gaugekit" / "ops").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders == {*OPERATORS, *CODES}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "python/gaugekit/ops").glob("*/cuda.py")), ids=lambda p: p.parent.name
)
def test_what_is_registered_for_cuda_is_imported(path):
    """Nothing calls it but torch: unless the folder imports it, the composition answers on a GPU and nobody notices."""
    imports = [
        (node.module, alias.name)
        for node in ast.parse((path.parent / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert (f"gaugekit.ops.{path.parent.name}", "cuda") in imports


def test_every_operator_is_registered_by_an_import_of_ops():
    tree = ast.parse((ROOT / "python" / "gaugekit" / "ops" / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == {*OPERATORS, *CODES}


@pytest.mark.parametrize("folder", ["reference", "cpu", "cuda", "triton"])
def test_no_file_without_a_stem(folder):
    pattern = FOLDERS[folder]
    parent = (ROOT / pattern).parent
    suffix = Path(pattern).suffix
    paths = list(parent.glob(f"*{suffix}"))
    assert paths
    for path in paths:
        assert path.stem == "__init__" or any(path.stem.startswith(stem) for stem in OPERATORS + CODES), (
            f"{path.relative_to(ROOT)} belongs to no stem"
        )


def test_no_top_level_module_but_ours():
    """The wheel's only top level is gaugekit: a top-level triton_kernels would hijack servers that probe for one."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    ]
    (packages,) = [
        ast.unparse(word.value) for call in calls for word in call.keywords if word.arg == "packages"
    ]
    assert packages == "find_packages('python')"
    names = find_packages(str(ROOT / "python"))
    assert {name.split(".")[0] for name in names} == {"gaugekit"} and "gaugekit.triton_kernels" in names


def test_source_folder_triton_kernels_refuses_the_top_level_name():
    source = (ROOT / "triton_kernels" / "__init__.py").read_text()
    with pytest.raises(ImportError, match="gaugekit.triton_kernels"):
        exec(source, {"__name__": "triton_kernels"})
    exec(source, {"__name__": "gaugekit.triton_kernels"})


@pytest.mark.parametrize("banned", ["utils", "helpers", "common", "misc"])
def test_no_drawer_for_two_ideas(banned):
    assert not list((ROOT / "python").rglob(f"{banned}.py"))
