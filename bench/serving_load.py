"""Clients that load an OpenAI server: many at once, streaming, some of which hang up and some of which talk nonsense.

HTTP is spoken by hand, since what the clients cost is taken from the server where both share a processor.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# How a request is wrong, and what of it; the server refuses each with a status of 400 or more.
MALFORMED = (
    "no json",
    "unknown field",
    "another model",
    "a prompt that is a number",
    "no such path",
    "max_tokens",
)
PATIENCE_S = 300  # a request that takes longer has failed


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens are to follow; ``kind`` "good", "cancelled" or one of MALFORMED."""

    prompt: str
    tokens: int
    kind: str = "good"


@dataclass
class Answer:
    """What came: ``status`` (0: the connection ended without one), ``text``, its ``tokens``, whether the stream was
    ``whole``, seconds from the request to the first text and to the end, and the reason, ``error``, where there is one.
    """

    status: int = 0
    text: str = ""
    tokens: int = 0
    whole: bool = False
    first_s: float = 0.0
    total_s: float = 0.0
    error: str = ""


@dataclass
class Load:
    """All answers, in the order of the requests; seconds from first to last; ``gauge`` at each hundred answers."""

    answers: list[Answer]
    seconds: float = 0.0
    gauge: list[float] = field(default_factory=list)


def mixed(count: int, letters: str, longest: int, tokens: int, seed: int = 0) -> list[Request]:
    """``count`` requests of mixed lengths, every tenth of which hangs up and every tenth of which is malformed."""
    chance, requests = random.Random(seed), []
    for number in range(count):
        prompt = "".join(chance.choices(letters, k=chance.randint(1, longest)))
        kind = {3: "cancelled", 7: MALFORMED[number // 10 % len(MALFORMED)]}.get(number % 10, "good")
        requests.append(Request(prompt, chance.randint(1, tokens), kind))
    return requests


def load(
    address: str,
    model: str,
    requests: list[Request],
    clients: int = 64,
    gauge: Callable[[], float] | None = None,
) -> Load:
    """Sends ``requests`` to ``address`` from ``clients`` clients at once, each taking the next as it is done."""
    return asyncio.run(_load(address, model, requests, clients, gauge))


async def _load(address, model, requests, clients, gauge) -> Load:
    result, waiting, done = Load([Answer() for _ in requests]), iter(enumerate(requests)), 0
    begin = time.perf_counter()

    async def client() -> None:
        nonlocal done
        for number, request in waiting:
            answer = result.answers[number]
            try:
                await asyncio.wait_for(ask(address, model, request, answer), PATIENCE_S)
            except (OSError, asyncio.TimeoutError, ValueError) as error:
                answer.error = answer.error or f"{type(error).__name__}: {error}"
            done += 1
            if gauge is not None and done % 100 == 0:
                result.gauge.append(gauge())

    await asyncio.gather(*(client() for _ in range(clients)))
    result.seconds = time.perf_counter() - begin
    return result


async def ask(address: str, model: str, request: Request, answer: Answer) -> None:
    """Sends one request and fills in its answer as it comes."""
    place = urlsplit(address)
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        path, body = spoken(model, request)
        head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        line = await reader.readline()
        answer.status = int(line.split()[1]) if line else 0
        while (line := await reader.readline()) not in (b"\r\n", b""):
            pass
        while line := await reader.readline():
            if not line.startswith(b"data: "):  # the lengths of chunks, blank lines
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.error = chunk["error"]
                return
            answer.first_s = answer.first_s or time.perf_counter() - begin
            answer.text += chunk["choices"][0]["text"]
            answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)
            answer.whole = chunk["choices"][0].get("finish_reason") is not None
            if request.kind == "cancelled":
                return
    finally:
        answer.total_s = time.perf_counter() - begin
        writer.close()


def spoken(model: str, request: Request) -> tuple[str, bytes]:
    """The path and body of a request."""
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.tokens,
        "stream": True,
        "temperature": 0,
    }
    changes = {
        "unknown field": {"frobnicate": 1},
        "another model": {"model": "nobody/nothing"},
        "a prompt that is a number": {"prompt": 7},
        "max_tokens": {"max_tokens": "many"},
    }
    path = "/v1/nonsense" if request.kind == "no such path" else "/v1/completions"
    text = json.dumps(body | changes.get(request.kind, {})).encode()
    return path, text[:-9] if request.kind == "no json" else text
