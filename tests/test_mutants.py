"""The mutation tool: it prints the change no test notices, and not the others, from a copy of the tree."""

import subprocess
from pathlib import Path

import pytest

import mutants
from warm import python

PLANTED = '''"""Planted."""


def double(x: int | None) -> int:
    """2 x."""
    return 2 * x


def clipped(x, limit=10):
    if x > limit:
        raise ValueError(f"{x + 1} is above {limit}")
    return x


def until(end):
    step = 0
    while step < end:
        step += 1
    return step
'''
NOTICING = """
from gaugekit import planted

def test_double():
    assert planted.double(3) == 6

def test_clipped():
    assert planted.clipped(4) == 4

def test_until():
    assert planted.until(0) == 0 and planted.until(3) == 3
"""


@pytest.fixture
def tree(tmp_path):
    package, tests = tmp_path / "python" / "gaugekit", tmp_path / "tests"
    package.mkdir(parents=True)
    tests.mkdir()
    (package / "__init__.py").touch()
    (package / "planted.py").write_text(PLANTED)
    (tests / "test_planted.py").write_text(NOTICING)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow: slow"]\n')
    return tmp_path


def run(tree, *arguments):
    """The tool in a process of its own, which has imported no gaugekit; a mutant that never ends has a second."""
    code = (
        "import sys, pytest, mutants; from pathlib import Path; mutants.SPARE_SECONDS = 1\n"
        "root, *rest = sys.argv[1:]\n"
        "tests = mutants.modules(Path(root), {'planted.py': 'test_*.py'})\n"
        "left, count = mutants.survivors(Path(root), tests, *map(int, rest))\n"
        "print(len(left), count)"
    )
    command = [*python(), "-W", "ignore", "-c", code, tree, *arguments]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=Path(mutants.__file__).parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_finds_what_no_test_notices_and_leaves_the_tree_alone(tree):
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    *lines, counts = run(tree)
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before
    # no test comes near the limit: the refusal, its edge and its number can go
    assert [line.removeprefix("python/gaugekit/planted.py:") for line in lines] == [
        "9: 10  ->  11",
        "10: x > limit  ->  x >= limit",
        "11: raise ValueError(f'{x + 1} is above {limit}')  ->  pass",
    ]
    # noticed: both of 2 * x, a return; the refusal turned round, a return; 0, <= and >=, += (for ever), 1, a return
    survived, count = map(int, counts.split())
    assert survived == 3 and count == 3 + 3 + 2 + 6


def test_every_mutant_is_a_program_and_a_sample_is_the_same_for_the_same_seed():
    found = mutants.mutants("m.py", PLANTED)
    assert len({mutant.text for mutant in found} | {PLANTED}) == len(found) + 1
    for mutant in found:
        compile(mutant.text, "m.py", "exec")
    five = mutants.draw(found, 5, seed=3)
    assert len(five) == 5 and five == sorted(five, key=found.index)
    assert mutants.draw(found, 5, seed=3) == five != mutants.draw(found, 5, seed=4)
    assert mutants.draw(found, None, seed=3) == mutants.draw(found, len(found), seed=3) == found


def test_modules_and_tests_are_all_there():
    found = mutants.modules(mutants.ROOT, mutants.TESTS)
    assert "python/gaugekit/rank/bounds.py" in found and all(found.values())
    with pytest.raises(
        ValueError, match="expected some of python/gaugekit/verbs/verify.py, .*; got python/gaugekit/none.py"
    ):
        mutants.modules(mutants.ROOT, mutants.TESTS, ["none.py"])
    with pytest.raises(ValueError, match="names tests/test_none.py"):
        mutants.modules(mutants.ROOT, {"verbs/verify.py": "test_none.py"})
