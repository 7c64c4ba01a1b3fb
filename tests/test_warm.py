"""Programs in forks of a warm process begin, say and end what they would in a process of their own."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from warm import python

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="beside a GPU every program has its own process"
)
LOOKS = """import os, sys
print(sys.argv, sys.path[0], os.getcwd(), os.environ.get("GIVEN"))
print("aside", file=sys.stderr)"""


def run(*arguments, **options):
    return subprocess.run(
        [*python(), *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def both(*arguments, **options):
    """What the warm process and a process of its own answer."""
    command = [sys.executable, *map(str, arguments)]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    return [(done.returncode, done.stdout, done.stderr) for done in (run(*arguments, **options), alone)]


def test_arguments_folder_environment_and_streams(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOOKS)
    for program in (("-c", LOOKS), (script,)):
        warm, alone = both(*program, "one", "two words", cwd=tmp_path, env={**os.environ, "GIVEN": "a value"})
        assert warm == alone and "a value" in warm[1] and warm[2] == "aside\n"


@pytest.mark.parametrize(
    "code",
    ["pass", "raise SystemExit(3)", "raise SystemExit('said')", "1/0", "import os; os.kill(os.getpid(), 9)",
     "import sys; sys.stdin.read() or print('read')", "import atexit; atexit.register(print, 'at exit')",
     "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"],
)  # fmt: skip
def test_every_end(code):
    warm, alone = both("-c", code, stdin=subprocess.DEVNULL)
    assert warm == alone


def test_warnings_are_filtered_as_asked():
    code = "import warnings; warnings.warn('heard', RuntimeWarning)"
    assert "heard" in run("-c", code).stderr and run("-W", "ignore", "-c", code).stderr == ""
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    assert run("-c", code, env=quiet).stderr == ""


def test_gaugekit_is_not_imported_and_torch_computes_on_its_threads():
    code = (
        "import sys, torch; assert 'torch' in sys.modules and 'gaugekit' not in sys.modules\n"
        "torch.set_num_threads(2); ones = torch.ones(600, 600)\n"
        "print((ones @ ones).sum().item(), torch.get_num_threads())"
    )
    assert run("-c", code).stdout == f"{600.0**3} 2\n"


def test_no_program_leaves_anything_to_the_next():
    assert run("-c", "import torch, sys; torch.left = sys.left = 1").returncode == 0
    assert (
        run(
            "-c", "import torch, sys; assert not hasattr(torch, 'left') and not hasattr(sys, 'left')"
        ).returncode
        == 0
    )


def test_a_command_that_is_killed_ends_its_program():
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert int(command.stdout.readline()) != command.pid
        command.send_signal(signal.SIGKILL)
        assert command.communicate(timeout=60)[0] == ""  # the program, which has the pipe too, has ended


def test_a_variable_that_was_read_already_is_refused():
    done = run("-c", "pass", env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 1 and "TRITON_INTERPRET is read at an import that is over" in done.stderr
