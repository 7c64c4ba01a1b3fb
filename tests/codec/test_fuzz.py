"""Mutations of sound blobs of every type and kind of symbols, checksums made right, under AddressSanitizer and UBSan.

FUZZ_SECONDS says for how long; ``make fuzz`` runs ten minutes.
"""

import os
import subprocess

SECONDS = os.environ.get("FUZZ_SECONDS", "5")


def test_mutated_blobs_do_no_harm(fuzz_target):
    command = [fuzz_target, "--mutate", SECONDS, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 2 * float(SECONDS))
    assert done.returncode == 0, done.stderr[-4000:]
    inputs, _, reached, *_ = done.stdout.replace(",", "").split()
    assert int(inputs) > 100 and int(reached) > int(inputs) / 4, done.stdout
