"""Mutations of sound blobs of every type and kind of symbols, checksums made right, under AddressSanitizer and UBSan.

FUZZ_SECONDS says for how long; ``make fuzz`` runs ten minutes.
"""

import os
import subprocess

import pytest

import arm

SECONDS = os.environ.get("FUZZ_SECONDS", "5")
DIGEST = "575584685"  # of the sound blobs, whose bytes no processor changes


def test_mutated_blobs_do_no_harm(fuzz_target):
    command = [fuzz_target, "--mutate", SECONDS, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 2 * float(SECONDS))
    assert done.returncode == 0, done.stderr[-4000:]
    inputs, _, reached, *_ = done.stdout.replace(",", "").split()
    assert int(inputs) > 100 and int(reached) > int(inputs) / 4, done.stdout


def test_the_encoder_makes_the_same_bytes(fuzz_target):
    done = subprocess.run([fuzz_target, "--digest"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [DIGEST]


@arm.EMULATED
@pytest.mark.slow
def test_arm_encodes_and_decodes_the_same_bytes(tmp_path):
    source = arm.ROOT / "csrc" / "fuzz" / "rans_fuzz.cpp"
    binary = arm.compiled(source, tmp_path / "fuzz", "-O1", "-ffp-contract=off")
    for processor in arm.PROCESSORS:
        assert arm.run(binary, processor, "--digest") == [DIGEST]
    (line,) = arm.run(binary, "max", "--mutate", "2", "1")
    assert line.endswith("nothing wrong") and int(line.split()[0]) > 100
