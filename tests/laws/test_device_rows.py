"""Law 8 for GPU rows: rotation past the cache, rounds within a budget, refusals in the row, on a backend of its own."""

import importlib.util
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/, and its GPU cases as they are registered."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("run", BENCH / "run.py")
        run = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(run)
        run.load_benchmarks()
        names = ("backends", "device_rows", "registry")
        yield namedtuple("Bench", (*names, "run"))(*(sys.modules[name] for name in names), run)
    finally:
        sys.path.remove(str(BENCH))
        own = {path.stem for path in BENCH.glob("*.py")}
        for name in set(sys.modules) - before & own:
            del sys.modules[name]


class Ticks:
    """A clock that only ``wait`` moves."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def wait(self, seconds):
        self.time += seconds


def case_of(bench, ours, rivals, **fields):
    fields = {
        "without_us": next(iter(rivals)),
        "check": lambda: None,
        "shape": "",
        "dtype": "bfloat16",
    } | fields
    return bench.registry.Case(op="probe", device="cuda", ours=ours, rivals=rivals, **fields)


Pair = namedtuple("Pair", "tensor columns")


def test_copies_are_larger_than_the_cache_and_keep_what_an_operand_is(bench):
    x = torch.randn(8, 32, 16).transpose(1, 2).requires_grad_()
    call = bench.registry.Call(lambda *operands: operands, (x, Pair(torch.ones(256), 7), [torch.zeros(4)]))
    assert call.bytes == 4 * (8 * 32 * 16 + 256 + 4)
    copies = call.copies(10 * call.bytes - 1)
    assert len(copies) == 10 and copies[0] is call
    for copy in copies[1:]:
        y, pair, (zeros,) = copy()
        assert torch.equal(y, x) and y.stride() == x.stride() and y.requires_grad and y.is_leaf
        assert isinstance(pair, Pair) and pair.columns == 7 and torch.equal(pair.tensor, torch.ones(256))
        assert not zeros.requires_grad
    places = {tensor.data_ptr() for copy in copies for tensor in (copy()[0], copy()[1].tensor, copy()[2][0])}
    assert len(places) == 30
    assert len(call.copies(call.bytes)) == 1  # as large as that already


def test_every_copy_takes_its_turn(bench):
    seen = []
    x = torch.zeros(1 << 10)
    backend = bench.backends.HostBackend(cache_bytes=10 * x.nbytes)
    program = bench.device_rows.program(
        bench.registry.Call(lambda y: seen.append(y.data_ptr()), (x,)), backend
    )
    seen.clear()
    program.run()
    assert program.calls == 20 == len(set(seen)) and program.rotated_bytes == 2 * backend.cache_bytes


@pytest.mark.parametrize(("ours", "rival", "expected"), [(1e-4, 3e-4, 15), (0.06, 0.09, 4), (10.0, 20.0, 3)])
def test_rounds_end_at_fifteen_or_with_the_budget_but_not_before_the_third(bench, ours, rival, expected):
    ticks = Ticks()
    backend = bench.backends.HostBackend(now=ticks)
    programs = {
        name: bench.device_rows.Program(lambda seconds=seconds: ticks.wait(2 * seconds), 2, None)
        for name, seconds in (("ours", ours), ("rival", rival))
    }
    times = bench.device_rows.rounds(programs, backend, 1.0)
    assert [len(values) for values in times.values()] == [expected, expected]
    assert times["ours"] == pytest.approx([ours] * expected) and times["rival"] == pytest.approx(
        [rival] * expected
    )
    warming = 2 * 2 * (ours + rival)
    assert ticks.time - warming <= max(1.0, 3 * 2 * (ours + rival)) + 2 * (ours + rival)


def test_rows_say_what_no_graph_held_what_a_rival_refused_and_whether_the_goal_is_reached(bench):
    ticks = Ticks()

    class Graphs(bench.backends.HostBackend):
        """Holds every program but a rival's."""

        def graph(self, calls):
            if calls[0] is slow:
                raise bench.backends.NotCapturable("it synchronises")
            return lambda: [call() for call in calls]

        def seconds(self, run, repeats):
            return super().seconds(run, repeats) or 1e-3  # the peaks' calls do not move the clock

    def slow():
        ticks.wait(0.03)

    def refuses():
        raise RuntimeError("no available kernel\nmore")

    class Refusing(Graphs):
        def graph(self, calls):
            if calls[0] is refuses:
                calls[0]()
            return super().graph(calls)

    rivals = {"slow": slow, "quick": lambda: ticks.wait(0.015), "refuses": refuses, "missing": None}
    case = case_of(
        bench, lambda: ticks.wait(0.01), rivals, without_us=("slow", "quick", "refuses"), goal=("quick", 1.6)
    )
    rows = bench.device_rows.measure(case, 0.5, Refusing(now=ticks), {})
    slow_row, quick, refused, missing = rows
    assert all(row["graph"] and row["median_ms"] == pytest.approx(10) for row in rows)
    assert slow_row["ratio"] == pytest.approx(3) and slow_row["baseline_graph"] is False
    assert slow_row["baseline_graph_refused"] == "it synchronises" and "goal" not in slow_row
    assert quick["ratio"] == pytest.approx(1.5) and quick["baseline_graph"] and "refused" not in quick
    assert quick["goal"] == ["quick", 1.6] and quick["goal_reached"] is False
    assert refused["absent"] and refused["refused"] == "RuntimeError: no available kernel"
    assert refused["ratio"] is None and missing["absent"] and "refused" not in missing
    assert {row["without_us"] for row in rows} == {quick["ratio"]}  # the fastest of those that count
    assert quick["copy_bytes_per_second"] > 0 and quick["product_flops_per_second"] > 0


def test_share_of_peak_is_of_the_peaks_in_the_row(bench):
    class Steady(bench.backends.HostBackend):
        def graph(self, calls):
            return lambda: None

        def seconds(self, run, repeats):
            return 2e-3 * repeats

    case = case_of(
        bench, lambda: None, {"r": lambda: None}, bytes_moved=1 << 20, goal=("share_of_peak", 0.01)
    )
    (row,) = bench.device_rows.measure(case, 0.1, Steady(), {})
    assert row["copy_bytes_per_second"] == pytest.approx(2 * (1 << 24) / 2e-3)
    assert row["share_of_peak"] == pytest.approx((1 << 20) / (2 << 24)) and row["goal_reached"]


def test_wrong_results_and_broken_calls_of_ours_are_raised(bench):
    def wrong():
        raise AssertionError("off by one")

    def broken():
        raise RuntimeError("no room")

    backend = bench.backends.HostBackend()
    with pytest.raises(AssertionError, match="off by one"):
        bench.device_rows.measure(case_of(bench, lambda: None, {"r": None}, check=wrong), 0.1, backend, {})
    with pytest.raises(RuntimeError, match="no room"):
        bench.device_rows.measure(case_of(bench, broken, {"r": None}), 0.1, backend, {})


def test_every_operator_has_gpu_cases_that_are_named_before_they_are_built(bench):
    registry = bench.registry
    kernels = (
        "csrc/cuda/{}.cu",
        "triton_kernels/{}.py",
    )  # what tests/laws/test_names.py gives no reason to lack
    on_a_gpu = {
        op for op in registry.BENCHMARKS if any((BENCH.parent / k.format(op)).is_file() for k in kernels)
    }
    assert registry.GPU_BENCHMARKS.keys() == on_a_gpu and len(on_a_gpu) >= 6
    for op, cases in registry.GPU_BENCHMARKS.items():
        for quick in (False, True):
            planned = list(cases("cuda", quick))
            assert planned and all(isinstance(case, registry.Planned) and case.op == op for case in planned)
            names = [registry.name_of(case) for case in planned]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "op", sorted(path.stem.removeprefix("gpu_") for path in (BENCH / "ops").glob("gpu_*.py"))
)
def test_checks_of_gpu_cases_hold_for_the_compositions(bench, op):
    """The same checks on the CPU, where the operators' compositions answer; a wrong result does not pass them."""
    for planned in bench.registry.GPU_BENCHMARKS[op]("cpu", True):
        if "training step" in planned.shape:  # it compiles whole blocks
            continue
        case = planned.build()
        case.check()
        assert all(call is None or isinstance(call, bench.registry.Call) for call in case.rivals.values())
        assert isinstance(case.ours, bench.registry.Call) and case.ours.bytes > 0
