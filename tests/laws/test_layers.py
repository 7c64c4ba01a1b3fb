"""Law 2: imports go down only, and ``import gaugekit`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "gaugekit"

# A room may import rooms of a lower floor, and its own. Lazy imports (inside a function) count as well.
FLOORS = [
    {"places"},
    {
        "report",
        "_library",
        "samples",
        "progress",
        "streams",
        "config",
        "staging",
        "svg",
        "report_style",
        "wide_products",
    },
    {"reference"},
    {"ops"},
    {"codec"},
    {"models", "checkpoint", "nn"},
    {"moments"},
    {"statistics"},
    {"rewrite", "heal_state"},
    {"symmetry", "rank", "slicing", "verify_runs"},
    {"fuse", "inspect", "verify", "heal"},
    {"integrations"},
    {"doctor", "demo_speed", "report_figures", "report_parts"},
    {"report_page", "rank_page"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# Loading a model is asked of transformers through our integration: the two wings' meeting rooms reach it by name.
ALLOWED = {
    ("verify_runs", "integrations"): "a directory we wrote loads only once our quantizer is registered",
    ("fuse", "integrations"): "fused attention runs through the attention function registered there",
    ("heal", "integrations"): "a directory we wrote loads only once our quantizer is registered",
    ("inspect", "integrations"): "a directory we wrote loads only once our quantizer is registered",
    ("moments", "integrations"): "text is read by the tokenizer beside the weights, found there",
    ("rank", "integrations"): "the search for ranks runs a whole directory's model",
    ("statistics", "integrations"): "a directory we wrote loads only once our quantizer is registered",
}
FOREIGN = {  # who may import which foreign package; torch and numpy are free
    "transformers": {"integrations", "verify", "inspect", "statistics", "fuse", "demo", "cli"},
    "safetensors": {"checkpoint", "rewrite", "integrations", "verify", "inspect", "statistics", "demo"},
    "tqdm": {"progress"},
    "rich": {"demo"},
    "zstandard": {"demo_speed"},
    "triton": {"ops"},
}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path):
    """(line, module) of every import, with relative ones made absolute."""
    package = ("gaugekit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield node.lineno, module
            if module == "gaugekit":
                for alias in node.names:
                    yield node.lineno, f"gaugekit.{alias.name}"


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "gaugekit" or len(parts) == 1:
            continue
        other = parts[1]
        if not ((PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists()) or other == room:
            continue
        if (room, other) in ALLOWED:
            continue
        assert floor(other) < floor(room), (
            f"line {line}: {room} imports {other}, which is not on a lower floor"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_foreign_packages_stay_in_their_rooms(path):
    for line, module in imports(path):
        top = module.split(".")[0]
        if top in FOREIGN:
            assert room_of(path) in FOREIGN[top], f"line {line}: {room_of(path)} imports {top}"


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
