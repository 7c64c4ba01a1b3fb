"""What truncation costs all-MiniLM-L6-v2 and what healing wins back, measured on text that neither step has seen.

    python bench/rank_minilm.py --rank 16 --steps 500 --work DIR   # goes on where an earlier call stopped
    python bench/rank_minilm.py --min-cosine 0.99

Calibrated on the first half of the sentences of Python's documentation (``pydoc_data.topics``), measured on the whole
second half. Healed on the first half alone, or with ``--docstrings N`` on every N-th sentence of the docstrings of
Python's standard library as well (those that stand in the documentation left out). One line of JSON for each stage.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModel

import gaugekit as gk
from gaugekit import samples
from gaugekit.calibration.moments import observe, tokens
from gaugekit.progress import bar
from gaugekit.rank import embeddings

NOT_READ = {"test", "tests", "site-packages", "pydoc_data", "idlelib", "lib2to3", "turtledemo"}
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> list[str]:
    """The sentences of all docstrings of the standard library, files in order."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for file in sorted(root.rglob("*.py")):
        if NOT_READ.isdisjoint(file.relative_to(root).parts):
            nodes = ast.walk(ast.parse(file.read_bytes()))
            found += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, KINDS)]
    return samples.split("\n\n".join(found))


def neighbours(found: torch.Tensor) -> torch.Tensor:
    """[N, 10] the texts nearest to each."""
    return (found @ found.T).fill_diagonal_(-1).topk(10).indices


def measured(model, batches, expected: torch.Tensor) -> dict:
    """Mean and least cosine, relative error, share of the ten nearest neighbours that stay."""
    found = embeddings(model, batches)
    cosines = (found * expected).sum(1)
    same = (neighbours(found)[:, :, None] == neighbours(expected)[:, None]).any(2).double().mean()
    return {
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(cosines.min()),
        "relative_error": float((found - expected).norm() / expected.norm()),
        "top10": float(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    goals = parser.add_mutually_exclusive_group(required=True)
    goals.add_argument("--rank", type=int, help="channels kept in every head")
    goals.add_argument(
        "--min-cosine", type=float, help="ranks searched for; beside one rank for all; nothing is healed"
    )
    parser.add_argument("--steps", type=int, default=500, help="end to end; 0: only truncate")
    parser.add_argument(
        "--layer-steps", type=int, help="before them, layer by layer; default: a quarter of them"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--docstrings", type=int, metavar="N", help="heal on every N-th of their sentences, too"
    )
    parser.add_argument("--work", type=Path, help="where to go on from after an interruption")
    options = parser.parse_args()
    text = samples.split("\n\n".join(topics[name] for name in sorted(topics)))
    seen, held_out = text[: len(text) // 2], text[len(text) // 2 :]
    teacher, student, plain = (AutoModel.from_pretrained(samples.minilm()).eval() for _ in range(3))
    batches = tokens(teacher, held_out, 32)
    expected = embeddings(teacher, batches)

    def say(stage: str, model, **more) -> None:
        print(
            json.dumps({"stage": stage, **measured(model, batches, expected), **more}),
            flush=True,
        )

    if options.min_cosine is not None:
        found = gk.rank.truncate(student, seen, min_cosine=options.min_cosine)
        say(
            "each head its own rank",
            student,
            mean_rank=found["mean_rank"],
            least=min(map(min, found["ranks"])),
        )
        rank = math.ceil(found["mean_rank"])
        gk.rank.truncate(plain, moments=observe(teacher, seen), rank=rank)
        say("one rank", plain, mean_rank=rank)
        return
    gk.rank.truncate(plain, rank=options.rank)
    say("plain", plain)
    gk.rank.truncate(student, moments=observe(teacher, seen), rank=options.rank)
    say("aware", student)
    if not options.steps:
        return
    more = []
    if options.docstrings:
        more = [line for line in docstrings()[:: options.docstrings] if line not in set(text)]
    begin, cpu = time.perf_counter(), time.process_time()
    with bar("heal") as progress:
        report = gk.heal(
            student,
            teacher,
            seen + more,
            steps=options.steps,
            layer_steps=options.layer_steps,
            learning_rate=options.learning_rate,
            work_directory=options.work,
            progress=progress,
        )
    times = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - cpu}
    say(
        "healed",
        student,
        sentences=len(seen + more),
        steps=report["steps"],
        parameters=report["parameters"],
        **times,
    )
    print(json.dumps({"curve": report["curve"]}))


if __name__ == "__main__":
    main()
