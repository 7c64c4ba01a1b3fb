"""Every Triton launch of the tests marked gpu and of the benches, noted and compiled without a GPU.

    python tests/laws/launches.py record OUT.jsonl [--arch 90] [--of tests benches tiles shipped]
    python tests/laws/launches.py compile OUT.jsonl [--arch 90] [--jobs 2] [--report ROWS.jsonl]

``record`` runs them on a card of meta tensors (card.py) and writes one line a distinct launch: what Triton compiles for
and nothing else. What could not be followed to its end is named on stderr; the exit status is then 1. ``compile`` warms
Triton's cache (TRITON_CACHE_DIR) and fails for a launch that does not compile, that wants more shared memory than a
program can have, or that spills registers on sm_90 without a row in spills.py.

``--of`` chooses among the tests, the benches, the tiles and variants that a run on a GPU sets beside what ships, what
is shipped (every entry of the tile tables: configurations.py) and its representatives, one a kernel and specialisation;
without it, all but the last. Other architectures are enough with ``shipped``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "bench")]

import card  # noqa: E402
import configurations as configuration  # noqa: E402
import spills  # noqa: E402
import torch  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

import machine_code  # noqa: E402

# Bytes of shared memory a program can have; from NVIDIA's tuning guides.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


class Recorder:
    """The distinct launches, each with the first test or case that made it."""

    def __init__(self):
        self.source, self.launches = "", {}

    def __call__(self, function, specialization: str) -> None:
        data = json.loads(specialization)
        options = {name: data["options"][name] for name in ("num_warps", "num_stages")}
        names = list(data["signature"])
        constants = {
            names[key[0]]: value
            for key, value in zip(data["constant_keys"], data["constant_vals"], strict=True)
        }
        aligned = [
            names[key[0]] for key, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True) if value
        ]
        launch = {"module": function.module, "kernel": function.name, "signature": data["signature"],
                  "constants": constants, "aligned": aligned, "options": options}  # fmt: skip
        self.launches.setdefault(json.dumps(launch), self.source)

    def lines(self) -> list[str]:
        return [json.dumps(json.loads(launch) | {"from": source}) for launch, source in self.launches.items()]


class Unjudged(ast.NodeTransformer):
    """``assert x`` becomes ``x``: evaluated, for the launches in it, and not judged, for its numbers are none."""

    def visit_Assert(self, node):
        return ast.copy_location(ast.Expr(node.test), node)


class UnjudgedLoader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data, path, **_):
        return compile(ast.fix_missing_locations(Unjudged().visit(ast.parse(data, path))), path, "exec")

    def get_code(self, name):  # never from a file of bytecode, which judges
        return self.source_to_code(self.get_data(self.path), self.path)


def load(name: str, path: Path):
    """The module at ``path`` with its assertions unjudged."""
    loader = UnjudgedLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class Following:
    """The pytest plugin: says which test is running and keeps what stopped one."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.stopped, self.count = recorder, [], 0

    def pytest_runtest_setup(self, item):
        self.recorder.source = item.nodeid

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call"
        if report.failed:
            self.stopped.append((report.nodeid, str(report.longrepr).strip().splitlines()[-1]))

    def pytest_collectreport(self, report):
        if report.failed:
            self.stopped.append((report.nodeid, str(report.longrepr).strip().splitlines()[-1]))


ORACLES = (
    "nonlocal_energy",
    "ragged_attention",
    "shaped_attention",
    "shaped_combine",
    "single_cache_attention",
)


def weightless(oracle):
    """The oracle on meta tensors: its numbers would be compared with none, and take most of the time."""

    def call(*args, **kwargs):
        device = next(x for x in args + tuple(kwargs.values()) if _numbers(x)).device
        args, kwargs = tree_map(lambda x: x.to("meta") if _numbers(x) else x, (args, kwargs))
        packed = kwargs.get("cu_seqlens") is not None  # whose lengths the oracle reads
        with contextlib.nullcontext() if packed else torch.device("meta"):
            return oracle(*args, **kwargs).to(device)

    return call


def _numbers(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


# Tests of kernels that are CUDA's own: no Triton kernel is behind them, and they are not run.
CUDA_ONLY = (
    "tests/codec",
    "tests/ops/test_packed_linear_rows.py",
    "tests/ops/test_single_cache_attention_rows.py",
)
# Tests that need torch's numbers from a GPU, and what is lost where they stop.
STOP = {
    "tests/hf/cache/test_generating.py::test_offloaded": "layers that transformers moves by a stream of the card",
    "tests/nn/test_forms.py": "float64 products of torch",
    "tests/nn/test_triangular_projection.py": "float64 products of torch",
    "tests/symmetry/test_skipless.py": "inverses of matrices that torch computes; models in float64",
    "tests/verbs/test_fuse.py": "models in float64 go to the composition",
}


def torchs_attention(q, k, v, *_, scale=None, enable_gqa=False, **__):
    """In place of FlexAttention, which makes its own kernels: an output of the same shape, differentiable."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa)


def lighten_oracles() -> None:
    importlib.import_module("torch.nn.attention.flex_attention").flex_attention = torchs_attention
    for name in ORACLES:
        module = importlib.import_module(f"gaugekit.reference.{name}")
        setattr(module, name, weightless(getattr(module, name)))


def follow_tests(recorder: Recorder) -> tuple[int, list]:
    """Runs the tests marked gpu in this process; how many, and (test, reason) of those that stopped."""
    import pytest
    from _pytest.assertion import rewrite

    def unjudged(module, *_):
        Unjudged().visit(module)
        ast.fix_missing_locations(module)

    rewrite.rewrite_asserts, rewrite._read_pyc = unjudged, lambda *_: None
    sys.dont_write_bytecode = True
    for name in ("helpers", "triton_cases"):
        load(name, ROOT / "tests" / f"{name}.py")
    sys.modules["triton_cases"].Case.assert_gain_accurate = lambda *_: None  # another oracle, to judge by
    plugin = Following(recorder)
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--no-header", "--no-summary"]
    options += [f"--ignore={ROOT / path}" for path in CUDA_ONLY]
    pytest.main([*options, str(ROOT / "tests")], plugins=[plugin])
    known = [(name, why) for name, why in plugin.stopped if name.startswith(tuple(STOP))]
    for name, why in known:
        print(f"known not to be followed to its end: {name}: {why}", file=sys.stderr)
    print(
        f"{len(known)} of {plugin.count} tests are known not to be followed to their end: {', '.join(STOP)}"
    )
    return plugin.count, [stop for stop in plugin.stopped if stop not in known]


def follow_benches(recorder: Recorder) -> tuple[int, list]:
    """Runs our side and the check of every CUDA case of the benches."""
    import registry

    for path in sorted((ROOT / "bench" / "ops").glob("gpu_*.py")):
        load(path.stem, path)
    count, stopped = 0, []
    for op, cases in sorted(registry.GPU_BENCHMARKS.items()):
        if not (ROOT / "triton_kernels" / f"{op}.py").exists():
            continue
        for planned in cases("cuda", False):
            count += 1
            recorder.source = f"bench {op}: {planned.shape} {planned.dtype}"
            try:
                case = planned.build()
                for call in (case.ours, case.check):
                    call()
            except Exception as error:
                stopped.append((recorder.source, _said(error)))
    return count, stopped


def follow_tiles(recorder: Recorder) -> tuple[int, list]:
    """Runs every variant and every other tile that a run on a GPU sets beside what ships."""
    import gpu_tiles

    count = 0
    for width in gpu_tiles.WIDTHS:
        for line, call in gpu_tiles.candidates(width):
            count += 1
            recorder.source = "tile " + ", ".join(f"{name} {value}" for name, value in line.items())
            call()
    return count, []


def follow_configurations(recorder: Recorder, configurations) -> tuple[int, list]:
    count = 0
    for name, operands in configurations():
        count, recorder.source = count + 1, f"configuration {name}"
        configuration.launch(**operands)
    return count, []


def _said(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} ({place.name}:{place.lineno})"


FOLLOWED = {
    "tests": follow_tests,
    "benches": follow_benches,
    "tiles": follow_tiles,
    "shipped": functools.partial(follow_configurations, configurations=configuration.shipped),
    "representatives": functools.partial(follow_configurations, configurations=configuration.representatives),
}


def record(out: Path, arch: int, kinds: list[str]) -> int:
    recorder, begin, stopped, counts = Recorder(), time.perf_counter(), [], []
    torch.set_num_threads(1)
    with card.present(recorder, arch, SHARED[arch]):
        lighten_oracles()
        for kind in kinds:
            count, those = FOLLOWED[kind](recorder)
            counts.append(f"{count} {kind}")
            stopped += those
    out.write_text("".join(line + "\n" for line in recorder.lines()))
    for source, reason in stopped:
        print(f"not followed to its end: {source}: {reason}", file=sys.stderr)
    print(f"{', '.join(counts)}: {len(recorder.launches)} launches, {len(stopped)} not followed to their end, "
          f"{time.perf_counter() - begin:.0f} s")  # fmt: skip
    return 1 if stopped or not recorder.launches else 0


def compile_launch(line: str, arch: int) -> dict:
    """One recorded launch through Triton for sm_<arch>, and what its machine code is like."""
    import triton

    card.driver(triton, arch)
    launch = json.loads(line)
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    names = list(launch["signature"])
    data = {
        "name": kernel._fn_name, "signature": launch["signature"], "key": line, "options": launch["options"],
        "constant_keys": [[names.index(name)] for name in launch["constants"]],
        "constant_vals": list(launch["constants"].values()),
        "attrs_keys": [[i] for i, name in enumerate(names) if launch["signature"][name] != "constexpr"],
        "attrs_vals": [[["tt.divisibility", 16]] if name in launch["aligned"] else [] for name in names
                       if launch["signature"][name] != "constexpr"],
    }  # fmt: skip
    types = {name: kind.lstrip("*") for name, kind in launch["signature"].items() if kind[0] == "*"}
    row = {
        "kernel": launch["kernel"],
        "from": launch["from"],
        "types": types,
        "constants": launch["constants"],
    }
    try:
        compiled = kernel.preload(json.dumps(data))
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
    row |= {"shared": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    return row | machine_code.describe(compiled.asm["cubin"])


def compile_all(lines: list[str], arch: int, jobs: int) -> Iterator[dict]:
    """Rows of ``compile_launch``, in the order of the lines, each as soon as it is there."""
    if jobs == 1:
        yield from (compile_launch(line, arch) for line in lines)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_launch, lines, [arch] * len(lines))


def faults(rows: list[dict], arch: int) -> list[str]:
    """What law 7 forbids, one sentence a row."""
    found = []
    for row in rows:
        name = f"{row['kernel']} ({row['from']})"
        if "error" in row:
            found.append(f"{name} does not compile: {row['error']}")
        elif row["shared"] > SHARED[arch]:
            found.append(
                f"{name}: {row['shared']} bytes of shared memory, {SHARED[arch]} are there on sm_{arch}"
            )
        elif row["spills"] and arch == 90 and spills.reason(row) is None:
            found.append(f"{name}: spills, {row['stack']} bytes of stack, {row['registers']} registers")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["record", "compile"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--arch", type=int, choices=sorted(SHARED), default=90)
    parser.add_argument(
        "--of", nargs="+", choices=list(FOLLOWED), default=["tests", "benches", "tiles", "shipped"]
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--report", type=Path, help="a file for what came out, one JSON line a launch")
    given = parser.parse_args()
    if given.what == "record":
        return record(given.file, given.arch, given.of)
    begin = time.perf_counter()
    rows = []
    with given.report.open("w") if given.report else contextlib.nullcontext() as report:
        for row in compile_all(given.file.read_text().splitlines(), given.arch, given.jobs):
            rows.append(row)
            if report:
                print(json.dumps(row), file=report, flush=True)
    wrong = faults(rows, given.arch)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    done = [row for row in rows if "error" not in row]
    print(f"{len(rows)} launches for sm_{given.arch}: {len(rows) - len(done)} do not compile, "
          f"{sum(row['spills'] > 0 for row in done)} spill, most shared memory "
          f"{max((row['shared'] for row in done), default=0)} bytes, most registers "
          f"{max((row['registers'] for row in done), default=0)}, {time.perf_counter() - begin:.0f} s")  # fmt: skip
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
