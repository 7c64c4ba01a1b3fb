"""Tries the wheel where it was installed: every module imports, an operator, packing and the command line answer.

Run in an environment of its own, away from the checkout: python -I smoke.py
"""

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import torch
from safetensors.torch import save_file

import gaugekit as gk
from gaugekit import _library

# derived from classes of vLLM
OF_VLLM = {
    f"gaugekit.integrations.vllm.{name}" for name in ("converted", "loader", "quantization", "ranks", "sas")
}


def main() -> None:
    place = Path(gk.__file__).resolve()
    assert place.is_relative_to(Path(sys.prefix).resolve()), f"expected the wheel's gaugekit, got {place}"
    names = [module.name for module in pkgutil.walk_packages(gk.__path__, "gaugekit.")]
    names = [
        name
        for name in names
        if name.partition(".")[2].removesuffix(".abi3") not in ("__main__", "_cpu", "_cuda", "_codec")
    ]
    names = [name for name in names if name not in OF_VLLM or importlib.util.find_spec("vllm")]
    for name in names:
        importlib.import_module(name)
    (plugin,) = entry_points(group="vllm.general_plugins", name="gaugekit")
    assert plugin.load() is importlib.import_module("gaugekit.integrations.vllm").register
    for name in ("cpu", "codec"):
        backend = _library.backends()[name]
        assert backend.loaded, f"expected the C++ binary to load: {backend.why}"

    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    ours = gk.shaped_attention(q, k, v, causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)

    weight = torch.randn(256, 256).mul(0.02).bfloat16()
    packed = gk.pack_weight(weight)
    assert torch.equal(gk.unpack_weight(packed), weight) and packed.bytes < weight.nbytes
    with tempfile.TemporaryDirectory() as folder:
        plain, small, again = (Path(folder, f"{name}.safetensors") for name in ("plain", "small", "again"))
        save_file({"weight": weight}, plain)
        gk.codec.pack(plain, small)
        gk.codec.unpack(small, again)
        assert small.stat().st_size < plain.stat().st_size and again.read_bytes() == plain.read_bytes()

    command = Path(sys.executable).with_name("gaugekit")
    done = subprocess.run([command, "doctor"], capture_output=True, text=True, check=True)
    assert "gaugekit" in done.stdout and "loaded" in done.stdout
    options = {"--op": "canonical_qr", "--shape": "32", "--threads": "1", "--budget": "0.01"}
    line = [command, "bench", "--json", *sum(options.items(), ())]
    rows = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert [row["commit"] for row in rows] == [f"gaugekit {gk.__version__}"], f"expected one row, got {rows}"
    print(
        f"{place.parent.name} {gk.__version__}: {len(names)} modules, operator, packing, doctor and bench answer"
    )


if __name__ == "__main__":
    main()
