"""With this folder on PYTHONPATH a checkout is imported as it stands: without an installation, nothing built for it."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class TritonKernels:
    """``gaugekit.triton_kernels`` stands beside the package's folder, where an installation puts it inside."""

    def find_spec(self, name, path=None, target=None):
        if name != "gaugekit.triton_kernels":
            return None
        folder = ROOT / "triton_kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.path.insert(0, str(ROOT / "python"))
sys.meta_path.insert(0, TritonKernels())
