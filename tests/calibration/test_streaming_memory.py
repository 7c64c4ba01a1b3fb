"""Calibration under a memory cap that its activations would not fit; and text that cannot be read."""

import subprocess
import sys

import pytest
import torch

import gaugekit as gk
from gaugekit.calibration import streaming
from tiny import add_tokenizer, bert

CAPPED = """
import resource, sys, torch
from gaugekit import statistics
from gaugekit.calibration import collect
model, text, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
collect(model, text, max_tokens=2000, batch_size=4)  # whatever is loaded and started only once
def held():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
cap = held() + (14 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
try:
    torch.empty(tokens, 256).fill_(1.0)  # what the hidden states of one layer take
    sys.exit(77)  # the system does not keep to the cap
except RuntimeError:
    pass
found = collect(model, text, batch_size=4)
assert len(found) == 2 and found[1]["q"].count == tokens, found[1]["q"].count
"""


def test_activations_larger_than_the_memory(tmp_path):
    """25,600 tokens 256 wide: 26 MB a layer, of which the process may hold 14 MiB at once beside what it had."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux":
        pytest.skip("the system caps no memory")
    bert(hidden_size=256, intermediate_size=16).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    # Equal lengths: kernels that are made anew for every shape would count as well.
    lines = [
        (f"Line {number:03} " + "has words that stand in every line " * 4)[:127] + "."
        for number in range(200)
    ]
    tokens = 200 * 128  # one a letter
    (tmp_path / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        CAPPED,
        tmp_path / "model",
        tmp_path / "text.txt",
        tokens,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the system does not keep to the cap")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "text: expected sentences of 40 to 400 characters"),
        (
            "Ein Sätzchen, das nicht in UTF-8 geschrieben steht.".encode("latin-1"),
            "text: expected a UTF-8 text file",
        ),
        (None, "text: expected a UTF-8 text file"),
    ],
    ids=["empty", "not UTF-8", "absent"],
)
def test_bad_text_is_named_wherever_it_is_given(content, message, tmp_path):
    path, file = tmp_path / "model", tmp_path / "text.txt"
    bert().save_pretrained(path)
    add_tokenizer(path)
    if content is not None:
        file.write_bytes(content)
    model, other = (type(bert()).from_pretrained(path) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (
        lambda: streaming.collect(path, file, work_directory=tmp_path / "work"),
        lambda: streaming.observe(model, file),
        lambda: gk.rank.truncate(model, file, rank=4),
        lambda: gk.rank.truncate(model, file, min_cosine=0.9),
        lambda: gk.heal(model, other, file, steps=1),
        lambda: gk.verify(path, path, text=file),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "work").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
