"""Every example runs as it stands; --quick takes the same code path on less data."""

import os
import subprocess
from pathlib import Path

import pytest

from warm import python

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(example, tmp_path):
    if example.stem.startswith("serve_"):
        pytest.importorskip("fastapi")  # the extra serving
        pytest.importorskip("openai")
    done = subprocess.run(
        [*python(), str(example), "--quick"],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "an example shows something"
