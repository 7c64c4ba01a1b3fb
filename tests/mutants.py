"""Changes gaugekit in one place at a time and prints the changes that no test notices.

    python tests/mutants.py                               # make mutants: every module below, hours
    python tests/mutants.py --sample 50                   # MUTANTS=50 make mutants: so many, drawn by --seed
    python tests/mutants.py rank/bounds.py verbs/heal.py        # all mutants of some modules

A mutant is one operator, comparison, condition or number changed, one keyword argument or one statement left out. Each
stands alone in a copy of the tree in a temporary folder, where the tests named for its module run until one fails; the
working tree is never written to. One process imports what is slow to import, and each run is a fork of it (so this
needs a system with fork). The same seed draws the same mutants.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("bert", "gpt2", "llama", "qwen2")
SLOW_IMPORTS = (
    "pytest", "hypothesis", "torch", "safetensors.torch", "tokenizers", "transformers", "transformers.generation.utils",
    "transformers.tokenization_utils_tokenizers", *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
)  # fmt: skip
DIRECTORIES = "codec/test_directory.py codec/test_resumption.py"
TESTS = {  # modules, or folders of them, under python/gaugekit: the tests under tests/ that should notice a change
    "verbs/verify*.py": "verbs/test_verify*.py",
    "verbs/heal*.py": "verbs/test_heal*.py",
    "verbs/convert.py": "verbs/test_convert*.py",
    "rank/bounds.py": "rank/test_bounds*.py",
    "rank/[!b]*.py": "rank/test_spectra.py rank/test_truncate.py",
    "rewrite": "verbs/test_convert*.py",
    "checkpoint/[rw]*er.py": "checkpoint/test_reader.py verbs/test_convert*.py",
    "codec/packing.py": f"codec/test_files.py codec/test_save_file.py {DIRECTORIES}",
    "codec/directories/job.py": f"codec/test_files.py {DIRECTORIES}",
    "codec/directories/index.py": DIRECTORIES,
    "files/durable.py": f"files/test_durable.py codec/test_files.py codec/test_places.py {DIRECTORIES}",
    "coder/b*.py": "coder/test_blob.py cli/test_without_torch.py",
    "codec/files/saving.py": "codec/test_save_file.py codec/test_dtypes.py",
    "codec/files/bundle.py": "codec/test_bundle.py codec/test_packed_damage.py",
    "files/staging.py": f"verbs/test_convert.py {DIRECTORIES}",
    "files/places.py": f"codec/test_places.py {DIRECTORIES}",
    "calibration/streaming.py": "calibration/test_streaming.py verbs/test_convert_statistics.py",
    "calibration/moments.py": "calibration/test_streaming.py rank/test_spectra.py",
    "symmetry": "symmetry/test_*.py",
}

TIMES, SPARE_SECONDS = (
    4,
    30,
)  # what a mutant may take: so many times what the unchanged tests take, and some more

ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
COMPARISONS = {  # the edge first, where there is one, then the opposite
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a module: where it stands, what was there, what is there instead, and the module's new text."""

    module: str
    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.before}  ->  {self.after}"


def mutants(module: str, text: str) -> list[Mutant]:
    """Every change of the module's ``text``, in the order of its lines."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node in _reached(ast.parse(text)):
        for after in _changes(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            put = f"({after})" if isinstance(node, ast.expr) else after
            changed = b"".join(lines)[:begin] + put.encode() + b"".join(lines)[end:]
            found.append(Mutant(module, node.lineno, ast.unparse(node), after, changed.decode()))
    return sorted(found, key=lambda mutant: mutant.line)


def _reached(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes to change: no imports, annotations or decorators, no text and nothing that only words an error."""
    yield node
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Raise, ast.arg)):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _reached(child)


def _changes(node: ast.AST) -> Iterator[str]:
    """What may stand in the place of ``node``."""
    if isinstance(node, ast.stmt):
        yield from _statements(node)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARISONS[type(node.ops[0])]:
            yield _with(node, ops=[other()])
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        value = node.value
        yield (
            repr(not value)
            if isinstance(value, bool)
            else repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        )
    elif isinstance(node, ast.Call):
        for dropped in node.keywords:
            if dropped.arg is not None:
                yield _with(node, keywords=[keyword for keyword in node.keywords if keyword is not dropped])


def _statements(node: ast.stmt) -> Iterator[str]:
    left_out = isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete, ast.Break, ast.Continue))
    if isinstance(node, ast.Expr):
        left_out = not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom))
    elif isinstance(node, ast.Assign):  # a name that is never bound would only be a crash
        left_out = not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
    if left_out:
        yield "pass"
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return None"


def _with(node: ast.AST, **fields) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return ast.unparse(changed)


def modules(root: Path, tests: dict[str, str], wanted: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """{module: its test files}, both relative to ``root``; ValueError for a name that stands for no file."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, names in tests.items():
        files = [_matching(root, "tests/" + name) for name in names.split()]
        for module in _matching(root, "python/gaugekit/" + pattern):
            found[module] = tuple(file for group in files for file in group)
    if not wanted:
        return found
    chosen = ["python/gaugekit/" + name.removeprefix("python/gaugekit/") for name in wanted]
    for name in chosen:
        if name not in found:
            raise ValueError(f"modules: expected some of {', '.join(found)}; got {name}")
    return {name: found[name] for name in chosen}


def _matching(root: Path, pattern: str) -> list[str]:
    paths = [file for path in root.glob(pattern) for file in (path.glob("*.py") if path.is_dir() else [path])]
    found = sorted(str(path.relative_to(root)) for path in paths)
    if not found:
        raise ValueError(f"tests/mutants.py names {pattern}, and there is no such file")
    return found


def survivors(
    root: Path, tests: dict[str, tuple[str, ...]], sample: int | None = None, seed: int = 0
) -> tuple[list[Mutant], int]:
    """The mutants no test noticed, and how many there were; each survivor is printed as it is found."""
    every = [
        mutant for module in tests for mutant in mutants(module, (root / module).read_text(encoding="utf-8"))
    ]
    drawn = draw(every, sample, seed)
    left = []
    with tempfile.TemporaryDirectory(prefix="gaugekit-mutants-") as folder:
        tree = Path(folder) / "tree"
        _copy(root, tree)
        limits = {files: _unchanged(tree, files) for files in dict.fromkeys(tests[m.module] for m in drawn)}
        for mutant in drawn:
            place = tree / mutant.module
            original = place.read_text(encoding="utf-8")
            place.write_text(mutant.text, encoding="utf-8")
            if _run(tree, tests[mutant.module], limits[tests[mutant.module]]) == 0:
                left.append(mutant)
                print(mutant, flush=True)
            place.write_text(original, encoding="utf-8")
    return left, len(drawn)


def draw(every: list[Mutant], sample: int | None, seed: int) -> list[Mutant]:
    """``sample`` of the mutants in their order, the same for the same seed; all where there are no more."""
    if sample is None or sample >= len(every):
        return every
    return [every[index] for index in sorted(random.Random(seed).sample(range(len(every)), sample))]


def _copy(root: Path, tree: Path) -> None:
    """What the tests of the modules read: the package with its binaries and kernels, the tests, the settings."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("python", "tests"):
        shutil.copytree(root / name, tree / name, ignore=unwanted)
    if (root / "triton_kernels").is_dir():
        shutil.copytree(
            root / "triton_kernels", tree / "python" / "gaugekit" / "triton_kernels", ignore=unwanted
        )
    shutil.copy(root / "pyproject.toml", tree)


def _unchanged(tree: Path, files: tuple[str, ...]) -> float:
    """The seconds a mutant may take, by what the tests, which must pass, take unchanged."""
    begin = time.monotonic()
    if _run(tree, files, 3600) != 0:
        told = (tree / "output.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"the tests fail before anything is changed: {' '.join(files)}\n{told[-2000:]}")
    return TIMES * (time.monotonic() - begin) + SPARE_SECONDS


def _run(tree: Path, files: tuple[str, ...], limit: float) -> int:
    """pytest's exit status on ``files``, or that of a process that was ended after ``limit`` seconds."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            status = _child(tree, files)
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    done, status = 0, 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # and whatever it started itself
    if not done:
        _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def _child(tree: Path, files: tuple[str, ...]) -> int:
    os.setsid()
    os.chdir(tree)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    # a mutant of the same second and size would be taken for what was compiled before it
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree / "python")}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(tree / "python"))
    spec = importlib.util.find_spec("gaugekit")
    if "gaugekit" in sys.modules or spec is None or not Path(spec.origin).is_relative_to(tree):
        print("gaugekit would not be imported from the copy")
        return 70
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={tree / 'tmp'}"]
    return int(pytest.main([*options, *files]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as rank/bounds.py; default: all")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants instead of all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws the sample; default: 0")
    arguments = parser.parse_args(argv)
    try:
        tests = modules(ROOT, TESTS, arguments.modules)
    except ValueError as error:
        parser.error(str(error))
    for name in SLOW_IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    left, count = survivors(ROOT, tests, arguments.sample, arguments.seed)
    print(f"{len(left)} of {count} mutants survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
