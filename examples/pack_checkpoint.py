"""Packs a checkpoint, restores it, and shows that nothing changed but the size.

    python examples/pack_checkpoint.py [SOURCE] [--quick]

SOURCE is a .safetensors file or a directory with some; without one, a small random transformer's weights are made in
bfloat16. Everything is written to a temporary folder.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import gaugekit as gk


def random_checkpoint(path: Path, width: int, layers: int) -> None:
    """Normal weights of 1 / sqrt(width), as a freshly initialised transformer has."""
    shapes = {"attention": (4 * width, width), "mlp.up": (4 * width, width), "mlp.down": (width, 4 * width)}
    weights = {
        f"layers.{layer}.{name}.weight": (torch.randn(shape) * width**-0.5).bfloat16()
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def digest(path: Path) -> dict[str, str]:
    """SHA-256 of the file, or of every file in the directory."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smaller random checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or Path(folder) / "model.safetensors"
        if options.source is None:
            random_checkpoint(source, *((256, 2) if options.quick else (1024, 4)))
        packed, restored = Path(folder) / "packed", Path(folder) / "restored"
        print(gk.codec.pack(source, packed, verify=True))
        print(gk.codec.unpack(packed, restored))
        assert digest(restored) == digest(source)
        print("restored byte for byte (SHA-256)")
        first = packed if packed.is_file() else next(packed.glob("*.safetensors"))
        with gk.codec.safe_open(first) as file:
            name = file.keys()[0]
            print(f"read from the packed file: the first rows of {name}, {file.get_slice(name)[:2].shape}")


if __name__ == "__main__":
    main()
