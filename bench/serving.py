"""A server under load, with gaugekit's parts and without: answers, errors, memory, tokens a second, latencies.

    python bench/serving.py --save            # 1,000 requests of 64 clients at once to each server
    python bench/serving.py --requests 100    # fewer
    python bench/serving.py --alone MODEL     # tokens a second of one client: MODEL in bfloat16, plain and packed

The model is a Llama of random weights, D 128, 2 layers, a letter a token, in float32; each server is a process of its
own with continuous batching. Every tenth request is given up in the middle, every tenth is what no server should take.
Every other answer has to be whole, and the text that the model gives by itself: where one differs, the logits there are
looked at, and it counts as a tie only where the first two are no further apart than four times the noise of float32.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import gaugekit as gk
import gaugekit.integrations.transformers  # a converted model loads with it, and is random without
from gaugekit.integrations.sas import SASConfig, SASForCausalLM
from run import commit, machine, save
from serving_load import Request, load, mixed

LETTERS = string.ascii_letters + string.digits
VOCABULARY = len(LETTERS) + 2
PAGES = ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]
CLIENTS, LONGEST, TOKENS = 64, 64, 24
WITHOUT_US = (
    "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
)
PATIENCE_S = 180


class Server:
    """A server in a process of its own, once it answers."""

    def __init__(self, command: list[str], port: int, log):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.address = f"http://localhost:{port}"
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.2)
        raise RuntimeError("a server did not start; its log stands above")

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def serving(directory: Path, *options: str, ours: bool = True) -> Iterator[Server]:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    program = ["-m", "gaugekit", "serve"] if ours else ["-c", WITHOUT_US, "serve"]
    command = [sys.executable, *program, str(directory), "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        server = Server(command, port, log)
        try:
            server.wait()
            yield server
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(20)
            except subprocess.TimeoutExpired:
                server.process.kill()


def directories(folder: Path) -> dict[str, Path]:
    """{kind: directory}: a Llama, plain and converted, and a SAS model of the same sizes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=0)  # fmt: skip
    llama = transformers.LlamaConfig(**sizes, intermediate_size=256, initializer_range=0.2)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "plain")
    sas = SASForCausalLM(SASConfig(**sizes, rope=True))
    with torch.no_grad():
        for parameter in sas.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.1)
    sas.save_pretrained(folder / "sas")
    ids = {"[PAD]": 0, "[UNK]": 1, **{letter: 2 + index for index, letter in enumerate(LETTERS)}}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for kind in ("plain", "sas"):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]"
        )
        tokenizer.save_pretrained(folder / kind)
    gk.convert(folder / "plain", folder / "converted", [gk.symmetry.GaugeFix()])
    return {kind: folder / kind for kind in ("plain", "converted", "sas")}


class Alone:
    """What the model of a directory says without a server, one prompt at a time."""

    def __init__(self, directory: Path):
        make = transformers.AutoModelForCausalLM.from_pretrained
        self.model, self.double = (make(directory, dtype=d).eval() for d in (torch.float32, torch.float64))

    @functools.lru_cache(maxsize=None)  # noqa: B019, UP033 - two servers of a model are asked the same
    def text(self, request: Request) -> str:
        ids = self._ids(request.prompt)
        options = dict(do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
        said = self.model.generate(ids, max_new_tokens=request.tokens, **options)[0, ids.shape[1] :].tolist()
        return "".join(LETTERS[token - 2] for token in said if token > 1)

    @torch.no_grad()
    def is_tie(self, prompt: str, expected: str, given: str) -> bool:
        """Whether the two texts part where the first two logits are within four times the noise of float32."""
        pairs = enumerate(zip(expected, given, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(given)))
        ids = self._ids(prompt + expected[:same])
        exact = self.double(ids).logits[0, -1]
        noise = (self.model(ids).logits[0, -1] - exact).abs().max()
        first, second = exact.topk(2).values
        return bool(first - second <= 4 * noise)

    @staticmethod
    def _ids(text: str) -> torch.Tensor:
        return torch.tensor([[LETTERS.index(letter) + 2 for letter in text]])


@functools.cache
def itself(directory: Path) -> Alone:
    return Alone(directory)


def measure(label: str, directory: Path, requests: list[Request], ours: bool, *options: str) -> dict:
    """The row of one server; AssertionError where a good answer is missing, broken or wrong."""
    options = ("--continuous-batching", "--dtype", "float32", *options, *(["--"] if ours else []), *PAGES)
    with serving(directory, *options, ours=ours) as server:
        load(server.address, str(directory), requests[:CLIENTS], CLIENTS)  # warms up
        result = load(server.address, str(directory), requests, CLIENTS, server.resident_mb)
    print(f"{label}: {result.seconds:.1f} s", file=sys.stderr, flush=True)
    good = [pair for pair in zip(requests, result.answers, strict=True) if pair[0].kind == "good"]
    broken = [answer for _, answer in good if answer.status != 200 or answer.error or not answer.whole]
    assert not broken, f"{label}: {len(broken)} of {len(good)} good requests failed: {broken[:3]}"
    wrong = [
        r
        for r, a in zip(requests, result.answers, strict=True)
        if r.kind not in ("good", "cancelled") and a.status < 400
    ]
    assert not wrong, f"{label}: taken although malformed: {wrong[:3]}"
    alone, ties, letters = itself(directory), 0, 0
    for request, answer in good:
        given, expected = answer.text.replace(" ", ""), alone.text(request)
        letters += len(given)
        if given != expected:
            assert alone.is_tie(request.prompt, expected, given), (
                f"{label}: {request}: {expected!r}, got {given!r}"
            )
            ties += 1
    assert ties <= len(good) / 100, f"{label}: {ties} of {len(good)} answers parted at ties"
    first, total = ([getattr(answer, name) for _, answer in good] for name in ("first_s", "total_s"))
    return {
        "op": "serving", "shape": f"{len(requests)} requests, {CLIENTS} clients, D 128, 2 layers", "dtype": "float32",
        "label": label, "good": len(good), "failed": 0, "ties": ties, "seconds": result.seconds,
        "tokens_per_s": letters / result.seconds, "requests_per_s": len(requests) / result.seconds,
        "first_text_ms": percentiles(first), "total_ms": percentiles(total),
        "resident_mb": [round(x, 1) for x in result.gauge],
    }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}


def alone(directory: Path, tokens: int = 48, rounds: int = 5) -> list[dict]:
    """Tokens a second of one client, the servers taking turns, in bfloat16; ``ratio``: the median over that of the
    first in the same turn.
    """
    request = [Request("Once upon a time", tokens)]
    kinds = {
        "transformers serve": (False,),
        "gaugekit serve": (True,),
        "gaugekit serve --packed": (True, "--packed"),
    }
    speeds: dict[str, list[float]] = {label: [] for label in kinds}
    with contextlib.ExitStack() as stack:
        servers = {
            label: stack.enter_context(serving(directory, "--dtype", "bfloat16", *options, ours=ours))
            for label, (ours, *options) in kinds.items()
        }
        for turn in range(rounds + 1):
            for label, server in list(servers.items())[:: 1 if turn % 2 else -1]:
                (answer,) = load(server.address, str(directory), request, 1).answers
                assert answer.whole and answer.tokens > 1, f"{label}: {answer}"
                if turn:
                    speeds[label].append((answer.tokens - 1) / (answer.total_s - answer.first_s))
    first = next(iter(speeds.values()))
    shape = f"{directory.name}, one client, {tokens} tokens"
    return [
        {"op": "serving", "shape": shape, "dtype": "bfloat16", "label": label, "tokens_per_s": statistics.median(found),
         "ratio": statistics.median(b / a for a, b in zip(first, found, strict=True))}
        for label, found in speeds.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", metavar="MODEL", type=Path, help="measure one client instead")
    parser.add_argument("--save", action="store_true", help="keep the rows under bench/results")
    arguments = parser.parse_args()
    rows = []
    if arguments.alone is not None:
        rows = alone(arguments.alone)
    else:
        requests = mixed(arguments.requests, LETTERS, LONGEST, TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            kinds = directories(Path(folder))
            transformers.utils.logging.disable_progress_bar()
            for label, kind, ours, *options in (
                ("transformers serve, sdpa", "plain", False),
                ("gaugekit serve, gaugekit attention", "plain", True, "--attn-implementation", "gaugekit"),
                ("gaugekit serve, gauge-fixed", "converted", True),
                ("gaugekit serve, SAS", "sas", True),
            ):
                rows.append(measure(label, kinds[kind], requests, ours, *options))
                print(json.dumps(rows[-1]), flush=True)
    where = {"machine": machine("cpu"), "commit": commit(), "threads": torch.get_num_threads()}
    rows = [{**row, **where} for row in rows]
    print(json.dumps(rows, indent=1))
    if arguments.save:
        save(rows, "serving" if arguments.alone is None else "serving-alone", "cpu")


if __name__ == "__main__":
    main()
