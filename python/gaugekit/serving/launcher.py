"""``gaugekit serve``: hands a model directory to ``transformers serve``, with gaugekit's parts registered.

The server, its endpoints and its batching are transformers' own; docs/serving.md says what was tried with them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gaugekit.checkpoint.config import read_config
from gaugekit.hf import loading
from gaugekit.report import Report

EXTRA = "pip install gaugekit[serving]"
PACKAGES = ("transformers", "fastapi", "uvicorn", "openai", "pydantic", "accelerate", "typer")
OURS = "gaugekit"
PATIENCE_S = 30


def serve(
    directory: str | Path,
    *,
    host: str = "localhost",
    port: int = 8000,
    continuous_batching: bool = False,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    packed: bool = False,
    cache: str | None = None,
    more: Sequence[str] = (),
    announce: Callable[[str], None] | None = None,
) -> Report:
    """Serves ``directory`` until the process is interrupted or told to end; then a Report of where it was.

    Arguments as :func:`running` has them. ``announce`` is called with the address once requests are answered.
    """
    begin = time.monotonic()
    options = {"host": host, "port": port, "continuous_batching": continuous_batching, "dtype": dtype}
    options |= {"attn_implementation": attn_implementation, "packed": packed, "more": more}
    options["cache"] = cache

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt), running(directory, **options) as address:
            if announce is not None:
                announce(address)
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, before)
    fields = {"model": str(directory), "seconds": round(time.monotonic() - begin, 1)}
    report = Report("serve", fields)
    report.done = f"Served {directory} for {fields['seconds']:.0f} s; nothing was written."
    report.next = f"gaugekit serve {shlex.quote(str(directory))}, to go on"
    return report


@contextlib.contextmanager
def running(
    directory: str | Path,
    *,
    host: str = "localhost",
    port: int = 0,
    continuous_batching: bool = False,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    packed: bool = False,
    cache: str | None = None,
    more: Sequence[str] = (),
) -> Iterator[str]:
    """Runs ``transformers serve directory`` in a thread; yields its address, http://host:port, once it answers.

    ``directory``: a Hugging Face directory with a tokenizer, of a model that generates: plain, packed, converted,
        sliced or SAS; requests name it as it was given.
    ``port``: 0 takes a free one.
    ``continuous_batching``: batches requests over a paged cache; else each runs by itself, one after the other.
    ``dtype``: "auto" (as stored) or the name of a torch dtype.
    ``attn_implementation``: None (of a converted model gaugekit's, else transformers' choice), "gaugekit", or a name
        that transformers serve takes.
    ``packed``: keeps the matrices packed in memory (bfloat16 or float16).
    ``cache``: "x" or "v" as ``gaugekit.fuse`` takes it: one cached tensor a layer, of gaugekit's attention; not with
        ``continuous_batching``.
    ``more``: further options of transformers serve, as on its command line: ["--device", "cpu"].

    Raises ValueError for a directory that cannot be served, a port that is taken and options transformers refuses,
    ImportError where the extra is missing.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"serving needs {', '.join(missing)}: {EXTRA}")
    _check(directory, packed)
    _check_cache(cache, continuous_batching, attn_implementation)
    _check_port(host, port)
    arguments = ["--host", host, "--port", str(port), "--dtype", dtype, "--non-blocking"]
    arguments += ["--continuous-batching"] if continuous_batching else []
    if attn_implementation not in (None, OURS):
        arguments += ["--attn-implementation", attn_implementation]
    server = _start([str(directory), *arguments, *more], attn_implementation, packed, cache)
    try:
        yield _address(server, host)
    finally:
        server.kill_server()


def _check(directory: str | Path, packed: bool) -> None:
    """ValueError where ``directory`` is no model that transformers serve could answer with."""
    path = loading.directory(directory, "DIR")
    if packed and read_config(path).get("quantization_config"):
        # transformers would go by what config.json says, and leave the matrices as they are
        raise ValueError(f"--packed: expected a plain or packed directory, got a converted one: {directory}")
    kind = loading.architecture(path)
    if not getattr(kind, "can_generate", bool)():
        raise ValueError(
            f"DIR: expected a model that generates text, got {kind.__name__} in {str(directory)!r}"
        )
    if loading.tokenizer(path) is None:
        raise ValueError(f"DIR: expected a tokenizer in {str(directory)!r}, found none")


def _check_cache(cache: str | None, continuous_batching: bool, attention: str | None) -> None:
    """ValueError where one cached tensor is asked for and cannot be, whatever the model."""
    if cache is not None and continuous_batching:
        raise ValueError(
            "--cache: expected without --continuous-batching, whose pages hold keys and values, got both"
        )
    if cache is not None and attention not in (None, OURS):
        raise ValueError(f"--cache: expected --attn-implementation {OURS} or none beside it, got {attention}")


def _check_port(host: str, port: int) -> None:
    """ValueError where nothing can listen there: a model takes long to load, and uvicorn would only log it."""
    if not 0 <= port < 1 << 16:  # getaddrinfo takes what is left of it by 65,536
        raise ValueError(f"--port: expected 0 to 65535, got {port}")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = places[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ValueError(f"--port: expected a free one on {host}, got {port}: {error}") from None


def _start(arguments: list[str], attention: str | None, packed: bool, cache: str | None) -> Any:
    """The running server, transformers' ``Serve``, of a command line of transformers serve."""
    loading.transformers()
    import typer
    from transformers.cli.serve import Serve

    from gaugekit.serving import manager

    app = typer.Typer(add_completion=False)
    app.command(name="serve")(Serve)
    # typer brings click with it, or a copy of its own
    refusal = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    with manager.installed(attention, packed, cache):
        try:
            return typer.main.get_command(app).main(
                arguments, prog_name="transformers serve", standalone_mode=False
            )
        except refusal as error:
            raise ValueError(f"transformers serve: {error.format_message()}") from None


def _address(server: Any, host: str) -> str:
    """Where ``server`` listens, once it does; OSError where it ended instead."""
    end = time.monotonic() + PATIENCE_S
    while not server.server.started:
        if not server._thread.is_alive() or time.monotonic() > end:
            raise OSError("the server did not start; its reason stands above")
        time.sleep(0.01)
    port = server.server.servers[0].sockets[0].getsockname()[1]
    return f"http://{host}:{port}"
