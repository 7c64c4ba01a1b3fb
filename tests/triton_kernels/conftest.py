"""The kernels' tests run on a GPU or, without one, in Triton's interpreter, chosen before triton is imported.

Other tests import triton too, so without a GPU ``test_interpreter.py`` runs these files in a process of their own;
``TRITON_INTERPRET=1 python -m pytest tests/triton_kernels`` runs them directly.
"""

import os
from importlib.metadata import version

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = [
        "test_shaped_*.py",
        "test_nonlocal_*.py",
        "test_ragged_*.py",
        "test_packed_*.py",
        "test_gauge_*.py",
        "test_single_*.py",
    ]


def _hasten() -> None:
    """Triton's interpreter replaces its language's functions anew at every call of one kernel's function by another.

    Where that was done already it would change nothing and take a quarter of the time; here it is skipped.
    """
    from triton.runtime import interpreter

    patch, language = interpreter._patch_lang, interpreter.tl

    def patch_once(function):
        seen = [
            value for value in function.__globals__.values() if value is language or value is language.core
        ]
        if any(language.core.is_builtin(module.load) for module in seen):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and version("triton").startswith(
    "3.6."
):  # its private functions
    _hasten()
