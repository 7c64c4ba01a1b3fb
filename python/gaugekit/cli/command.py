"""The command line: a subcommand for each verb, each a thin call of the function of the same name.

Exit status: 0 done; 1 ``verify`` or ``demo`` found more error than noise allows, or a benchmark gave a wrong result; 2
bad usage, bad input or a result that could not be printed, with one line on stderr; 130 interrupted. With
GAUGEKIT_TRACEBACK=1 in the environment the traceback of an error stands above its line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback

from gaugekit.cli import streams
from gaugekit.cli.parser import SHARED, divided, parser
from gaugekit.cli.refusals import UsageError, explained
from gaugekit.files.ranks import torchrun

CLOSED = "standard output is closed, so the result cannot be printed"


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit status; ``argv`` defaults to the process's arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv, streams.secure())
    except KeyboardInterrupt:
        streams.put(sys.stderr, "gaugekit: interrupted")
        return 130
    except Exception as error:
        if os.environ.get("GAUGEKIT_TRACEBACK"):
            streams.put(sys.stderr, traceback.format_exc())
        return _refuse(explained(argv, error))
    finally:
        streams.flush(sys.stderr)


def _run(argv: list[str], printable: bool) -> int:
    root = parser(argv)
    own, more = divided(argv)
    arguments = root.parse_args(own, argparse.Namespace(more=more))
    if arguments.run is None:
        root.print_help()
        return 0
    rank, size = torchrun()
    if size > 1 and not arguments.shared:
        shared = ", ".join(sorted(SHARED))
        raise UsageError(f"expected one process, got {size} of torchrun: only {shared} share their work")
    if not (printable or arguments.lasting):
        raise ValueError(CLOSED)
    # what a library prints while it works must not stand among the results
    with contextlib.redirect_stdout(sys.stderr):
        status, result, text = arguments.run(arguments)
    if rank:
        return status  # rank 0 prints for all
    error = streams.put(sys.stdout, json.dumps(result, allow_nan=False) if arguments.json else text())
    if printable and not streams.lost(error):
        return status
    reason = f"the result could not be printed: {error}" if printable else CLOSED
    if not arguments.lasting:
        return _refuse(f"gaugekit {argv[0]}: {reason}")
    streams.put(sys.stderr, f"gaugekit {argv[0]}: done, but {reason}")
    return status


def _refuse(message: str) -> int:
    streams.put(sys.stderr, " ".join(message.split()))
    return 2
