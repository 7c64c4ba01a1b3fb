"""What an editor and a type checker see: every public name, its real signature, types on every argument and result."""

import importlib
import importlib.machinery
import inspect
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import gaugekit as gk
from warm import python

ROOMS = [
    "calibration",
    "codec",
    "models",
    "nn",
    "ops",
    *sorted(f"ops.{path.parent.name}" for path in Path(gk.__file__).parent.glob("ops/*/__init__.py")),
    "rank",
    "rewrite",
    "serving",
    "slicing",
    "symmetry",
    "text",
]
SPECIAL = {"__init__", "__call__", "__getitem__", "__iter__", "__enter__", "__exit__"}

# what a user may write, line by line; pyright must find nothing in it
SOUND = """\
from pathlib import Path

import torch

import gaugekit as gk
from gaugekit.integrations.transformers import GaugekitConfig

q = torch.randn(1, 2, 4, 8)
y: torch.Tensor = gk.shaped_attention(q, q, q, alpha=1.0, beta=[0.5, 0.5], causal=True, key_lengths=[4])
energy: torch.Tensor = gk.nonlocal_energy(q, q, q, target=q, lam=0.6)
weight = gk.pack_weight(torch.randn(8, 8).bfloat16())
product: torch.Tensor = gk.packed_linear(torch.randn(2, 8), weight)
plain: torch.Tensor = gk.unpack_weight(weight)

model = torch.nn.Linear(3, 3)
reports: list[gk.Report] = [
    gk.inspect(Path("model"), text=["One sentence.", "Another."]),
    gk.convert("model", "fixed", [gk.symmetry.GaugeFix()], dtype="bfloat16"),
    gk.verify("model", "fixed", pool="mean"),
    gk.heal(model, model, "text.txt", steps=10),
    gk.fuse(model, packed=True),
    gk.unfuse(model),
    gk.rank.truncate(model, rank=16),
    gk.symmetry.fix(model),
    gk.codec.pack("model", "packed", symbols="exponent-and-mantissa"),
]
print(reports[0]["parameters"], reports[0].json(), *reports[0].notes)

blob = gk.codec.encode(q, symbols="exponent")
again: torch.Tensor = gk.codec.decode(blob)
gk.codec.save_file({"q": q}, "q.safetensors", symbols="high-byte")
block = gk.nn.SASBlock(64, 4, first=True)
x: torch.Tensor = block(torch.randn(1, 3, 64), lengths=[3])
sentences: list[str] = gk.samples.sentences(3)
configuration = GaugekitConfig(packed=True)
"""
# (a line that is wrong, a word of what pyright says)
MISTAKES = [
    ('gk.verify("a", "b", dtyp="bfloat16")', "dtyp"),
    ('gk.fuse("a directory")', "Module"),
    ("gk.shaped_attention(q, q, q, alpha={})", "alpha"),
    ('gk.codec.pack("a", "b", model=2)', "model"),
    ("gk.importlib", "importlib"),
    ("gk.verifi", "verifi"),
]


def functions(owner: object, name: str, seen: set[object]):
    """(name, function) of ``owner`` and, of a class, of its public methods."""
    if isinstance(owner, ModuleType) or owner in seen:
        return
    seen.add(owner)
    if inspect.isclass(owner):
        for method, value in vars(owner).items():
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and (not method.startswith("_") or method in SPECIAL):
                yield f"{name}.{method}", value
    elif inspect.isfunction(owner):
        yield name, inspect.unwrap(owner)


def public():
    seen: set[object] = set()
    for module in (gk, *(importlib.import_module(f"gaugekit.{room}") for room in ROOMS)):
        for name in module.__all__:
            if callable(value := getattr(module, name)) and value.__module__.startswith("gaugekit"):
                yield from functions(value, f"{module.__name__}.{name}", seen)


def test_every_public_argument_and_result_has_a_type():
    checked, bare = 0, []
    for name, function in public():
        checked += 1
        signature = inspect.signature(function)
        arguments = list(signature.parameters.values())
        if "." in function.__qualname__:
            arguments = [a for a in arguments if a.name not in ("self", "cls")]
        bare += [f"{name}({a.name})" for a in arguments if a.annotation is a.empty]
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            bare.append(f"{name} -> ?")
    assert checked > 100, "the walk finds nothing to check"
    assert not bare, bare


def test_the_rooms_are_all_walked():
    """A room with public names that this test does not know would go unchecked."""
    package = Path(gk.__file__).parent
    for init in package.glob("*/__init__.py"):
        room = (
            importlib.import_module(f"gaugekit.{init.parent.name}") if "__all__" in init.read_text() else None
        )
        assert room is None or init.parent.name in {*ROOMS, "cli", "checkpoint", "demo", "triton_kernels"}


def test_dir_shows_the_public_names_and_nothing_else():
    names = set(dir(gk))
    assert names == {*gk.__all__, "__version__"} and "importlib" not in names
    assert all(getattr(gk, name) is not None for name in names)
    for name in ("inspect", "convert", "verify", "heal", "fuse", "unfuse"):
        assert inspect.isfunction(inspect.unwrap(getattr(gk, name))), name
    assert list(inspect.signature(gk.verify).parameters)[:3] == ["a", "b", "text"]


@pytest.mark.parametrize(
    "first", ["import gaugekit", "import gaugekit.verbs.inspect", "from gaugekit.verbs.verify import verify"]
)
def test_a_verb_is_a_function_whatever_is_imported_first(first):
    """And Python's own ``inspect`` stays what it is."""
    names = ("convert", "fuse", "heal", "inspect", "unfuse", "verify")
    code = (
        f"{first}\nimport gaugekit as gk, inspect\n"
        f"print([name for name in {names} if not inspect.isfunction(inspect.unwrap(getattr(gk, name)))])"
    )
    done = subprocess.run([*python(), "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_says_that_it_has_types():
    assert (Path(gk.__file__).parent / "py.typed").is_file()


def test_the_package_is_found_on_a_path_without_import_hooks():
    """Type checkers read sys.path and run no hooks, so an install that works by one is invisible to them."""
    paths = [path for path in sys.path if path]
    spec = importlib.machinery.PathFinder.find_spec("gaugekit", paths)
    assert spec is not None and spec.submodule_search_locations
    kernels = importlib.machinery.PathFinder.find_spec(
        "gaugekit.triton_kernels", spec.submodule_search_locations
    )
    assert kernels is not None


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="needs pyright: pip install gaugekit[test]")
def test_pyright_finds_a_users_mistakes_and_no_others(tmp_path):
    lines = len(SOUND.splitlines())
    (tmp_path / "user.py").write_text(SOUND + "\n".join(line for line, _ in MISTAKES) + "\n")
    settings = {
        "typeCheckingMode": "basic",
        "extraPaths": [str(Path(gk.__file__).parents[1])],
        "reportUnusedExpression": False,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(tmp_path)], capture_output=True, text=True, timeout=840)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [(e["range"]["start"]["line"] - lines, e["message"]) for e in found if e["severity"] == "error"]
    assert [error for error in errors if error[0] < 0] == []
    for place, (line, word) in enumerate(MISTAKES):
        assert any(where == place and word in message for where, message in errors), (line, errors)
