"""Programs in forks of a process that has imported torch and transformers and computed nothing: they start at once.

``python()`` takes the place of ``[sys.executable]`` in a command: what follows (``-W``, ``-c``, ``-m``, a script) runs
with the standard streams, folder, environment and limit of file size of the command, and ends it with its own status
or signal. gaugekit itself is imported by the program, as always. Where the import is the subject, where memory is
counted, or where a variable that is read at an import differs (it is refused here), use ``sys.executable``.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import sys

# What programs of the tests import; nothing here computes, so that no thread is lost in a fork.
MODULES = (
    "numpy", "torch", "torch._dynamo", "torch._inductor.compile_fx", "safetensors.torch", "tokenizers",
    "tqdm.auto", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
)  # fmt: skip
# by scikit-learn, which transformers imports where tokens are drafted ahead: they may come while tests run
SET_AT_IMPORT = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
READ_AT_IMPORT = (
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "KMP_",
    "HF_",
    "TRANSFORMERS_",
    "TRITON_",
    "TORCH_",
    "LD_",
    "MALLOC_",
)
LONGEST_REQUEST = 1 << 20


@functools.cache
def python() -> list[str]:
    """The beginning of a command; beside a GPU, which a fork may not share, a process of its own."""
    import tempfile

    import torch

    if torch.cuda.is_available() or not hasattr(os, "fork"):
        return [sys.executable]
    folder = tempfile.mkdtemp(prefix="warm-")
    address = os.path.join(folder, "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    _start(listener)
    atexit.register(_remove, folder, address)
    return [sys.executable, "-S", "-E", __file__, address]


def _start(listener: socket.socket) -> None:
    """The process that imports and forks, a child of this one; it ends where the pipe says that this one has."""
    import subprocess

    alive, ours = os.pipe()
    os.set_inheritable(ours, False)
    command = [sys.executable, __file__, "--serve", str(listener.fileno()), str(alive)]
    server = subprocess.Popen(command, pass_fds=(listener.fileno(), alive), stdin=subprocess.DEVNULL)
    listener.close()
    os.close(alive)
    atexit.register(server.wait)
    atexit.register(os.close, ours)


def _remove(folder: str, address: str) -> None:
    os.unlink(address)
    os.rmdir(folder)


def ask(address: str, arguments: list[str]) -> None:
    """The command: hands over what it was given, waits, and ends as the program did."""
    import resource

    streams = [number for number in (0, 1, 2) if _is_open(number)]
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "streams": streams,
               "file_size": resource.getrlimit(resource.RLIMIT_FSIZE)}  # fmt: skip
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], streams)
    answer = connection.recv(64)
    status = int(answer) if answer else 1
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def serve(listener: socket.socket, alive: int) -> dict | None:
    """Forks for each request. Returns the request in the fork, and None in this process once nobody can ask."""
    import select

    running: dict[int, socket.socket] = {}
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([listener, alive, ended, *running.values()], [], [])
        if alive in ready:
            for process in running:
                os.kill(process, signal.SIGKILL)
            return None
        if ended in ready:
            os.read(ended, 4096)
            _answer(running)
        for process, connection in running.items():
            if connection in ready and not _asks_on(connection):
                os.kill(process, signal.SIGKILL)
        if listener in ready:
            connection, _ = listener.accept()
            request, streams = _receive(connection)
            if process := os.fork():
                running[process] = connection
                for stream in streams:
                    os.close(stream)
                continue
            signal.set_wakeup_fd(-1)
            for end in (ended, wake, alive):
                os.close(end)
            for other in (listener, connection, *running.values()):
                other.close()
            return request | {"received": streams}


def _asks_on(connection: socket.socket) -> bool:
    """Whether the command is still there: it sends nothing more, so what can be read is its end."""
    try:
        return bool(connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
    except BlockingIOError:
        return True


def _answer(running: dict[int, socket.socket]) -> None:
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        with running.pop(process) as connection, contextlib.suppress(OSError):  # the command was killed
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    data, streams, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(LONGEST_REQUEST)
    return json.loads(data), streams


def become(request: dict, variables: dict[str, str]) -> None:
    """Makes this fork the process that the request describes, its environment checked against ``variables``."""
    import resource

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (0, 1, 2):
        if number not in request["streams"]:
            os.close(number)
    # above the standard ones first, so that none is overwritten before it is in its place
    high = [os.dup(stream) if stream < 3 else stream for stream in request["received"]]
    for number, stream in zip(request["streams"], high, strict=True):
        os.dup2(stream, number)
    for stream in high:
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (_stream(number) for number in (0, 1, 2))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_FSIZE, tuple(request["file_size"]))
    os.chdir(request["folder"])
    asked = request["environment"]
    names = {
        name for name in variables.keys() | asked.keys() if name.startswith(READ_AT_IMPORT)
    } - SET_AT_IMPORT
    differ = [name for name in names if variables.get(name) != asked.get(name)]
    if differ:
        sys.exit(f"warm: {', '.join(sorted(differ))} is read at an import that is over; use sys.executable")
    os.environ.clear()
    os.environ.update(asked)


def _stream(number: int):
    import io

    if not _is_open(number):
        return None
    buffered = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115
    errors = "backslashreplace" if number == 2 else "strict"
    return io.TextIOWrapper(buffered, "utf-8", errors, line_buffering=number == 2 or os.isatty(number))


def program(arguments: list[str], paths: list[str]) -> None:
    """Runs what Python would run for these arguments; ``paths`` are those of the installation."""
    import runpy
    import types
    import warnings

    asked = [x for x in os.environ.get("PYTHONWARNINGS", "").split(",") if x]
    while arguments[0] == "-W":
        asked.append(arguments[1])
        arguments = arguments[2:]
    warnings._processoptions(asked)
    kind, rest = arguments[0], arguments[1:]
    if kind.startswith("-") and kind not in ("-c", "-m"):
        sys.exit(f"warm: expected -W, -c, -m or a script, got {kind}")
    first = "" if kind == "-c" else os.getcwd() if kind == "-m" else os.path.dirname(os.path.realpath(kind))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    main.__dict__.update({"__builtins__": __builtins__, "__spec__": None})
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.argv, source, name = ["-c", *rest[1:]], rest[0], "<string>"
    else:
        sys.argv, name = [kind, *rest], kind
        main.__file__ = kind
        with open(kind, encoding="utf-8") as file:
            source = file.read()
    exec(compile(source, name, "exec"), main.__dict__)


def end(work) -> None:
    """Calls ``work`` and ends the process as Python does, but frees nothing: that would copy all that was imported."""
    import threading

    status = 0
    try:
        work()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if status and not isinstance(exit.code, int) and sys.stderr:
            print(exit.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__
        while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError) as error:
        status = 120  # Python's own for an output that is lost at the end
        os.write(2, f"the output is lost: {error}\n".encode())
    os._exit(status & 0xFF)


def main() -> None:
    if sys.argv[1] != "--serve":
        ask(sys.argv[1], sys.argv[2:])
    import gc
    import importlib

    own = [os.path.dirname(os.path.abspath(__file__)), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    paths = [path for path in sys.path if path not in own]
    for name in MODULES:
        with contextlib.suppress(
            ImportError
        ):  # an extra that is not here: the program says so if it needs it
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to every page
    request = serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    if request is not None:
        end(lambda: (become(request, dict(os.environ)), program(request["arguments"], paths)))


if __name__ == "__main__":
    main()
