"""``vllm serve`` of packed and of gauge-fixed directories (``make test-vllm``), asked through OpenAI's client: in
float32 the greedy tokens of the plain model in transformers.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from served_by_vllm import PROMPTS, directories, own  # isort: skip - it says how vLLM starts

import gaugekit as gk

STARTS, ENDS = 600, 60  # seconds
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4",
           "--kv-cache-memory-bytes", str(1 << 26)]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    models = directories(tmp_path_factory.mktemp("models"))
    gk.codec.pack(models("converted"), models("converted").parent / "gauge-packed")
    return models


@contextlib.contextmanager
def served(directory, log, *options):
    """The address of ``vllm serve DIRECTORY OPTIONS`` on a free port of loopback; it has ended when this is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "vllm",
        "serve",
        directory,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, *options, *OPTIONS],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
        server.send_signal(signal.SIGTERM)
        server.wait(ENDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever is left of it, the engine and its ranks too
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait(server, address, log):
    """Until the server answers; AssertionError with its last words where it ends before, or takes too long."""
    deadline = time.monotonic() + STARTS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-4000:]
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(address, timeout=5),
        ):
            return
        time.sleep(0.5)
    pytest.fail(f"no answer in {STARTS} s: {log.read_text()[-4000:]}")


@pytest.mark.parametrize(
    "name, options",
    [
        ("packed", ["--load-format", "gaugekit"]),
        ("converted", []),
        ("gauge-packed", ["--load-format", "gaugekit", "--tensor-parallel-size", "2"]),
    ],
)
def test_it_answers_as_the_plain_model(models, tmp_path, name, options):
    import openai

    expected = own(models("plain"))
    directory = str(models(name))
    with served(directory, tmp_path / "log", *options) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)
        assert [model.id for model in client.models.list()] == [directory]
        how = {
            "max_tokens": 24,
            "temperature": 0,
            "extra_body": {"return_token_ids": True, "ignore_eos": True},
        }
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            (choice,) = client.completions.create(model=directory, prompt=prompt, **how).choices
            assert choice.token_ids == tokens
        several = client.completions.create(model=directory, prompt=PROMPTS, **how)  # a batch of them
        assert [choice.token_ids for choice in several.choices] == expected
