"""What each verb takes on the command line, and the words of ``--help``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import gaugekit
from gaugekit.cli import calls
from gaugekit.cli.refusals import Parser

DTYPES = ("float32", "bfloat16", "float16", "float64")
SYMBOLS = (
    "exponent",
    "high-byte",
    "exponent-and-mantissa",
)  # those of codec.encode, which brings torch with it
ROTATIONS = (
    "auto",
    "dense",
    "triangular",
    "polar",
    "bits-back",
)  # those of slicing.slice, which brings torch with it
MODEL = "a Hugging Face directory: config.json and safetensors"
# verbs whose work stands, in files or in the exit status, also where nothing can be printed
LASTING = {"convert", "heal", "verify", "pack", "unpack", "demo"}
SHARED = {"convert", "pack", "unpack"}  # verbs whose work several processes of torchrun share
EPILOG = "gaugekit VERB --help says what a verb takes. Documents: docs/cli.md in the source folder."

Adder = Callable[[str, Callable[[argparse.Namespace], calls.Outcome], str], Parser]


def parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser of ``gaugekit``, with a subparser for each verb.

    ``argv``: the command line it is for; the options of ``bench``, which a program of its own holds, are
    there where it names that verb.
    """
    root = Parser(
        prog="gaugekit", description="Removes from a transformer what nobody can observe.", epilog=EPILOG
    )
    root.add_argument("--version", action="version", version=f"gaugekit {gaugekit.__version__}")
    root.set_defaults(run=None)
    verbs = root.add_subparsers(metavar="VERB", parser_class=Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], calls.Outcome], summary: str) -> Parser:
        added = verbs.add_parser(name, help=summary, description=summary)
        added.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
        added.set_defaults(run=run, lasting=name in LASTING, shared=name in SHARED)
        return added

    _inspect(verb)
    _convert(verb)
    _heal(verb)
    _verify(verb)
    _pack(verb)
    _serve(verb)
    bench = verb("bench", calls.bench, "time every operator beside its rivals, on our shapes or on yours")
    if argv and argv[0] == "bench" and calls.BENCH.is_file():
        calls.benchmarks().add_options(bench)
    verb("doctor", calls.doctor, "what is installed, what is missing, and the command that mends it")
    demo = verb("demo", calls.demo, "the whole path on a real model, with a report page")
    demo.add_argument("--directory", metavar="DIR", default="build/demo", help="default: build/demo")
    return root


def _inspect(verb: Adder) -> None:
    added = verb(
        "inspect", calls.inspect, "count what cannot be observed; ranks, entropies, smoothing by layer"
    )
    added.add_argument(
        "model", metavar="MODEL", help=f"{MODEL}; or a config.json alone, which gives the counts"
    )
    added.add_argument("--text", metavar="FILE", help="UTF-8 text: adds the token cosine of each layer")


def _convert(verb: Adder) -> None:
    added = verb("convert", calls.convert, "write a rewritten copy of a model directory")
    added.add_argument("model", metavar="MODEL", help=MODEL)
    added.add_argument("out", metavar="OUT", help="the directory to write")
    added.add_argument("--gauge", action="store_true", help="remove the parameters that no output depends on")
    added.add_argument(
        "--rows",
        choices=("balanced", "max_volume", "shared_partition", "triangular"),
        help="which rows become the identity: for each head those that rounding harms least (balanced, the default) or "
        "that leave no entry above 1.02 (max_volume), or one partition for a layer; or turn each head until rows are "
        "triangular, which removes half as much (triangular)",
    )
    ranks = added.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, metavar="R", help="keep R query/key channels of every head")
    ranks.add_argument("--energy", type=float, metavar="E", help="keep the share E of each head's scores")
    ranks.add_argument(
        "--min-cosine",
        type=float,
        metavar="C",
        help="the smallest ranks that keep the mean cosine C of embeddings on every second sentence of --calibration",
    )
    added.add_argument("--calibration", metavar="FILE", help="UTF-8 text that says what matters")
    added.add_argument(
        "--slice", type=float, metavar="F", help="cut the share F of the residual stream (docs/slicing.md)"
    )
    added.add_argument(
        "--rotation", choices=ROTATIONS, help="how a sliced model's rotations are stored (auto: the smallest)"
    )
    added.add_argument(
        "--drop",
        type=_threshold,
        metavar="T",
        help="with --rotation polar: drop what turns the stream by less than T (auto: chosen by text held out)",
    )
    added.add_argument(
        "--quantize",
        choices=("int8",),
        help="with --rotation bits-back: store matrices as int8 with a scale a row (approximate)",
    )
    added.add_argument("--slice-head", action="store_true", help="slice what the head reads too")
    added.add_argument(
        "--dense", action="store_true", help="keep the plain layout, which loads without gaugekit"
    )
    added.add_argument(
        "--dtype", choices=DTYPES, help="store the weights so (default: as the model has them)"
    )
    added.add_argument("--pack", action="store_true", help="pack the result, without loss")


def _heal(verb: Adder) -> None:
    added = verb("heal", calls.heal, "distil back what an inexact rewrite lost")
    added.add_argument("student", metavar="STUDENT", help="the rewritten model")
    added.add_argument("teacher", metavar="TEACHER", help="the original")
    added.add_argument("out", metavar="OUT", help="the directory to write")
    added.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text to learn from, no labels")
    added.add_argument(
        "--steps",
        type=int,
        default=400,
        help="end to end (400); but in a sliced model after a quarter as many by layer",
    )
    added.add_argument("--batch-size", type=int, default=16, help="sentences a step (16)")
    added.add_argument("--learning-rate", type=float, help="at its highest (1e-3; of a sliced model 1e-4)")
    added.add_argument(
        "--parameters",
        metavar="PATTERN",
        action="append",
        help="what to train, repeatable (queries and keys; of a sliced model all but embeddings)",
    )


def _verify(verb: Adder) -> None:
    added = verb(
        "verify", calls.verify, "compare two models beside the noise of their dtype; exit status 0 or 1"
    )
    added.add_argument("a", metavar="A", nargs="?", help="the original")
    added.add_argument("b", metavar="B", nargs="?", help="the result")
    added.add_argument(
        "--certificate",
        metavar="OUT",
        help="with A and B: write what was verified into OUT, a new file or a directory; without B: check the "
        "certificate in OUT, A where the original stands elsewhere now",
    )
    added.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to read (default: 500 sentences of Python's documentation)"
    )
    added.add_argument("--dtype", choices=DTYPES, help="run both so (default: as A is stored)")
    added.add_argument(
        "--perplexity",
        metavar="FILE",
        help="for a result that is meant to differ: how well both foretell this UTF-8 text, and no verdict",
    )
    added.add_argument(
        "--pool", choices=("mean",), help="compare mean-pooled, normalised sentence embeddings"
    )


def _pack(verb: Adder) -> None:
    for name, run, summary in (
        ("pack", calls.pack, "compress safetensors losslessly into a valid .safetensors file"),
        ("unpack", calls.unpack, "restore packed files byte for byte"),
    ):
        added = verb(name, run, summary)
        added.add_argument("source", metavar="IN", help="a .safetensors file, or a directory that holds some")
        added.add_argument("target", metavar="OUT", help="the file or directory to write")
        memory = "buffers to work in, 64MiB or more, as 500MB or 2GiB (default: 256MiB)"
        added.add_argument("--memory", type=_bytes, default=256 << 20, metavar="SIZE", help=memory)
        if name == "pack":
            added.add_argument(
                "--verify", action="store_true", help="decode again and compare before it is published"
            )
            what = (
                "which bits of a bfloat16 are coded: its exponent (default), its high byte, or the exponent and two "
                "bits of the mantissa (smaller, slower)"
            )
            added.add_argument("--symbols", choices=SYMBOLS, help=what)


def _serve(verb: Adder) -> None:
    added = verb(
        "serve", calls.serve, "answer requests for a model by transformers serve (OpenAI's interface)"
    )
    added.add_argument("directory", metavar="DIR", help=f"{MODEL}; plain, packed, converted, sliced or SAS")
    added.add_argument("--host", default="localhost", help="the address to listen at (localhost)")
    added.add_argument("--port", type=int, default=8000, help="the port to listen at (8000; 0: a free one)")
    added.add_argument(
        "--continuous-batching", action="store_true", help="run requests together, over a paged cache"
    )
    added.add_argument("--dtype", default="auto", help="run the model so (default: as it is stored)")
    added.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="gaugekit, or a name transformers serve takes (default: gaugekit for converted models, else "
        "transformers' choice)",
    )
    added.add_argument(
        "--packed", action="store_true", help="keep the matrices packed in memory (bfloat16, float16)"
    )
    added.add_argument(
        "--cache",
        choices=("x", "v"),
        help="keep one tensor a token in place of keys and values: a layer's input (x: GPT-2, OPT, SAS without rotary "
        "positions) or its values (v: Gemma 4); not with --continuous-batching",
    )
    added.epilog = "What stands after -- goes to transformers serve: gaugekit serve DIR -- --device cpu"


def divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line of a verb, and what stands after --, which ``serve`` hands on."""
    if argv[:1] != ["serve"] or "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1 or auto, got {text!r}") from None


def _bytes(size: str) -> int:
    """A number of bytes as people write it: 500MB, 2GiB, 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", size.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GiB, got {size!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))
