"""Bits-back at the shapes of a sliced OPT-6.7B: a layer's two groups, coded and decoded once, and what 32 take.

    python bench/bitsback_layer.py                  # D = 3,272 of 4,096 (20 % sliced): some five minutes on two cores
    python bench/bitsback_layer.py --divide 8       # every shape an eighth
    python bench/bitsback_layer.py --model llama-2-7b --published

The weights are normal, rows of different lengths. ``--published`` times the published scheme's eigendecompositions
(examples/bits_back_eigen.py) on the second group in the same run. One JSON object on stdout: seconds by the clock and
of the processors, a layer and, times its layers, a model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path

import torch

from gaugekit.codec.bitsback import Coupling, Group, Part, decode, encode
from run import commit, machine

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "bits_back_eigen.py"
MODELS = {
    "opt-6.7b": (4096, 16384, 1, 32),
    "llama-2-7b": (4096, 11008, 2, 32),
}  # width, MLP, matrices in, layers


def clocked(call):
    """(result, seconds by the clock, seconds of the processors)."""
    wall, own = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - own


def groups_of(width: int, hidden: int, matrices_in: int, dimension: int, dtype: torch.dtype):
    """(the junction before attention, the one before the MLP), and the shortcut between."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int) -> torch.Tensor:
        lengths = 0.02 * torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
        return torch.randn(rows, dimension, generator=generator).mul_(lengths)

    attention = [
        Part("down", weight(hidden), dtype, 0),
        *(Part(name, weight(width), dtype) for name in "qkv"),
    ]
    mlp = [
        Part("o", weight(width), dtype, 0),
        *(Part(f"in{i}", weight(hidden), dtype) for i in range(matrices_in)),
    ]
    shortcut = torch.randn(dimension, dimension, generator=generator) / dimension**0.5
    return [Group(dimension, attention), Group(dimension, mlp)], [Coupling("shortcut", 0, 1, shortcut, dtype)]


def published(weight: torch.Tensor) -> dict:
    spec = importlib.util.spec_from_file_location("bits_back_eigen", EXAMPLE)
    eigen = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eigen)
    count = weight.shape[1] * (weight.shape[1] + 1) // 2
    message = (0.02 * torch.randn(count, generator=torch.Generator().manual_seed(1))).half()
    layer, encoding, encoding_own = clocked(lambda: eigen.encode(weight, message))
    back, decoding, decoding_own = clocked(lambda: eigen.decode(layer))
    exact = (back.view(torch.int16) == message.view(torch.int16)).double().mean().item()
    return {
        "encode_s": encoding,
        "encode_processor_s": encoding_own,
        "decode_s": decoding,
        "decode_processor_s": decoding_own,
        "returned_exactly": exact,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="opt-6.7b")
    parser.add_argument(
        "--slice", type=float, default=0.2, help="fraction of the width that is sliced away (0.2)"
    )
    parser.add_argument("--divide", type=int, default=1, help="divide every shape by this")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "int8"), default="float16")
    parser.add_argument(
        "--published", action="store_true", help="time the published scheme on the second group too"
    )
    arguments = parser.parse_args()
    width, hidden, matrices_in, layers = MODELS[arguments.model]
    width, hidden = width // arguments.divide, hidden // arguments.divide
    dimension = int(width * (1 - arguments.slice)) // 8 * 8
    groups, couplings = groups_of(width, hidden, matrices_in, dimension, getattr(torch, arguments.dtype))
    generator = torch.Generator().manual_seed(2)
    others = {"before": torch.randn(dimension, dimension, generator=generator).half()}

    (payload, report), encoding, encoding_own = clocked(lambda: encode(groups, others, couplings))
    rival = published(groups[1].parts[-1].weight) if arguments.published else None
    tensors, decoding, decoding_own = clocked(lambda: decode(payload))
    assert torch.equal(tensors["before"], others["before"]), "the message is not what it was"
    # of a layer, which has a shortcut into its other group too
    weights = sum(t.nbytes for name, t in tensors.items() if name != "before") + tensors["shortcut"].nbytes
    result = {
        "model": arguments.model,
        "dimension": dimension,
        "dtype": arguments.dtype,
        "machine": machine("cpu"),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "net_bits": [g.realised_bits / g.degrees_of_freedom for g in report.groups],
        "share_of_nominal": [g.share for g in report.groups],
        "layer": {
            "encode_s": encoding,
            "encode_processor_s": encoding_own,
            "decode_s": decoding,
            "decode_processor_s": decoding_own,
        },
        "model_minutes": {"encode": layers * encoding / 60, "decode": layers * decoding / 60},
        "model_processor_minutes": {
            "encode": layers * encoding_own / 60,
            "decode": layers * decoding_own / 60,
        },
        "saved_of_sliced": sum(g.realised_bits for g in report.groups) / (8 * weights),
        "published_on_the_last_matrix": rival,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
