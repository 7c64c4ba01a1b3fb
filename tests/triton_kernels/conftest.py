"""The kernels' tests run on a GPU or, without one, in Triton's interpreter, chosen before triton is imported.

Other tests import triton too, so without a GPU ``test_interpreter.py`` runs these files in a process of their own;
``TRITON_INTERPRET=1 python -m pytest tests/triton_kernels`` runs them directly.
"""

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_shaped_*.py", "test_nonlocal_*.py", "test_ragged_*.py", "test_packed_*.py"]
