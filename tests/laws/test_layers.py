"""Law 2: imports go down only, and ``import gaugekit`` stays light."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "gaugekit"

# A room may import rooms of a lower floor, and its own. Lazy imports (inside a function) count, and modules imported
# by the name in a string.
FLOORS = [
    {"_build", "report", "progress", "files", "pages", "reference", "triton_kernels"},
    {"coder"},
    {"_library"},
    {"ops"},
    {"codec", "nn", "models", "doctor"},
    {"checkpoint"},
    {"hf"},
    {"rewrite", "text"},
    {"calibration"},
    {"symmetry", "rank", "slicing"},
    {"verbs"},
    {"demo", "distributed", "integrations", "serving"},
    {"cli"},
    {"__main__"},
]
ROOT_FILES = {"__init__", "__main__", "_build", "_library", "report", "progress", "distributed", "doctor"}
FILES_IN_A_FOLDER, LINES_IN_A_FILE, LINES_IN_A_FUNCTION = 12, 400, 60
FOREIGN = {  # who may import which foreign package; torch and numpy are free
    "transformers": {"hf", "text", "demo", "serving"},
    "safetensors": {"checkpoint"},
    "tqdm": {"progress"},
    "zstandard": {"demo"},
    "triton": {"ops"},
    "lmcache": {"integrations"},
    "sglang": {"integrations"},
    "vllm": {"integrations"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NAMES = {
    ".".join(("gaugekit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    return list(_imports(path))


def _imports(path: Path):
    """(line, module) of every import, relative ones made absolute; of names taken from a module, each that is one."""
    package = ("gaugekit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            modules = [f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in NAMES]
            if len(modules) < len(node.names):
                modules.append(module)
            yield from ((node.lineno, name) for name in modules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def neighbours(path: Path) -> set[Path]:
    return {NAMES[module] for _, module in imports(path) if module in NAMES and NAMES[module] != path}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "gaugekit" or len(parts) == 1 or parts[1] == room:
            continue
        if (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists():
            assert floor(parts[1]) < floor(room), (
                f"line {line}: {room} imports {parts[1]}, which is not on a lower floor"
            )


def test_no_files_import_each_other_in_a_circle():
    graph = {path: neighbours(path) for path in FILES}
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(str(p.relative_to(PACKAGE)) for p in (*way, path))
        if path not in done:
            for other in sorted(graph.get(path, ())):
                visit(other, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_foreign_packages_stay_in_their_rooms(path):
    for line, module in imports(path):
        top = module.split(".")[0]
        if top in FOREIGN:
            assert room_of(path) in FOREIGN[top], f"line {line}: {room_of(path)} imports {top}"


def test_a_room_can_be_found_and_taken_in():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ROOT_FILES
    for folder in {path.parent for path in FILES} - {PACKAGE, PACKAGE / "nn"}:
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= FILES_IN_A_FOLDER, f"{folder.name}: {len(names)} files"
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= LINES_IN_A_FILE, f"{path.relative_to(PACKAGE)} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                begin = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.lineno
                assert node.end_lineno - begin <= LINES_IN_A_FUNCTION, f"{path.name}: {node.name} is too long"


def test_kernels_know_no_gaugekit():
    """Triton's kernels stand on torch, triton and Python's own library."""
    paths = list((PACKAGE.parents[1] / "triton_kernels").glob("*.py"))
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] in allowed


def test_import_is_lean():
    """``import gaugekit`` imports nothing heavy and touches no GPU."""
    # torch itself may import some of these; what counts is what gaugekit adds
    code = (
        "import sys, torch; before = set(sys.modules); import gaugekit;"
        "heavy = {'triton', 'transformers', 'safetensors', 'tqdm', 'rich', 'zstandard'};"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
