"""A sliced model coded with bits-back: the rotations that no output depends on give back the bits that chose them.

He, Flamich, Hernández-Lobato, Getting Free Bits Back from Rotational Symmetries in LLMs (2024). The float32 weights of
a dense sliced model are turned at each junction by a rotation that is read from the bits coded so far, rounded once,
and coded; what the decoder recovers of the rotations are those bits again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from gaugekit.checkpoint.config import CONFIG
from gaugekit.checkpoint.dtypes import name_of
from gaugekit.checkpoint.reader import INDEX, WEIGHTS, Checkpoint
from gaugekit.checkpoint.writer import CERTIFICATE
from gaugekit.codec.bitsback import Coupling, Group, Part, weights
from gaugekit.codec.bitsback.model import Progress, scale_name
from gaugekit.codec.files.chain import save_chain
from gaugekit.files.durable import copy, dump, sha256, write
from gaugekit.files.places import listing
from gaugekit.models import Stream
from gaugekit.report import Report
from gaugekit.slicing import page

DTYPES = (torch.bfloat16, torch.float16)  # those that transformers has modules for


class Chained:
    """The tensors of a dense sliced checkpoint, sorted by the rotation they share: one rotation a junction and, with
    ``head``, one for the end of the stream. All weights are rounded once, after their rotation: to ``dtype``, or with
    ``integers`` matrices to int8, each row by a scale of its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stream: Stream,
        prefix: str,
        head: bool,
        dtype: torch.dtype,
        integers: bool = False,
    ):
        self.checkpoint, self.stream, self.prefix = checkpoint, stream, prefix
        self.head, self.dtype = head, dtype
        self.matrices = torch.int8 if integers else dtype
        self.names = set(checkpoint.names())
        count = stream.places + (1 if head else 0)
        self.parts: list[list[Part]] = [[] for _ in range(count)]
        self.couplings: list[Coupling] = []
        self.taken: set[str] = set()
        self._ends()
        places = [junction for junctions in stream.junctions for junction in junctions]
        for place, junction in enumerate(places):
            for reader in junction.readers:
                self._add(place, f"{reader}.weight", axis=0 if stream.transposed else 1)
            if place + 1 < count:
                for writer in junction.writers:
                    self._add(place + 1, f"{writer}.weight", axis=0)
                    self._add(place + 1, f"{writer}.bias", axis=1)
            shortcut = f"{junction.writers[-1]}.shortcut.matrix"
            if place + 1 < count:
                name, weight = self._take(shortcut)
                self.couplings.append(Coupling(name, place, place + 1, weight, self.matrices))
            else:
                self._add(place, shortcut, axis=0)

    def groups(self) -> list[Group]:
        """Those of ``codec.bitsback``, in the order of the model."""
        return [Group(parts[0].weight.shape[-1], parts) for parts in self.parts]

    def others(self) -> dict[str, Tensor]:
        """What no rotation touches, rounded likewise."""
        tensors = {}
        for name in self.checkpoint.names():
            if name in self.taken:
                continue
            stored = [self.checkpoint.read(name)]
            if stored[0].is_floating_point():
                stored = weights.store(name, stored[0], self.matrices if stored[0].dim() == 2 else self.dtype)
            for part, tensor in zip((name, scale_name(name)), stored, strict=False):
                if part in tensors:
                    raise ValueError(f"{part}: expected no tensor of this name, which {name}'s scales take")
                tensors[part] = tensor
        return tensors

    def _ends(self) -> None:
        stream = self.stream
        tokens = f"{stream.tokens}.rotation" if stream.tied else f"{stream.tokens}.weight"
        self._add(0, tokens, axis=1)
        if stream.positions is not None:
            self._add(0, f"{stream.positions}.weight", axis=1)
        if self.head:
            self._add(-1, f"{stream.head}.rotation", axis=0, prefix="")
            if not stream.tied:
                self._add(-1, f"{stream.head}.weight", axis=1, prefix="")

    def _take(self, name: str, prefix: str | None = None) -> tuple[str, Tensor]:
        name = (self.prefix if prefix is None else prefix) + name
        self.taken.add(name)
        return name, self.checkpoint.read(name)

    def _add(self, group: int, name: str, axis: int, prefix: str | None = None) -> None:
        """Puts a tensor into a group: ``axis`` is the one that is rotated. Nothing where there is none of that name."""
        if (self.prefix if prefix is None else prefix) + name not in self.names:
            return
        name, tensor = self._take(name, prefix)
        weight = tensor.mT if axis == 0 and tensor.dim() == 2 else tensor
        dtype = self.matrices if tensor.dim() == 2 else self.dtype
        self.parts[group].append(Part(name, weight.contiguous(), dtype, axis))


def pack(
    original: Path,
    source: Path,
    target: Path,
    stream: Stream,
    prefix: str,
    head: bool,
    dtype: torch.dtype,
    integers: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Codes the float32 directory ``source`` (``dense``, as ``slice`` writes it of ``original``) into a new packed one,
    ``target``, from which tensors are read in ``dtype``; with ``integers`` its matrices are stored as int8.

    Report: claim, stored, bytes_after, bits_per_weight, and what the rotations came to, in bits: degrees_of_freedom,
    nominal_bits, realised_bits, corrections_bits, seed_bits, groups. ``progress`` is told (rotations done, in all).
    Memory: the model in float32.
    """
    checkpoint = Checkpoint(source)
    chained = Chained(checkpoint, stream, prefix, head, dtype, integers)
    target.mkdir()
    report, size = save_chain(
        target / WEIGHTS,
        chained.groups(),
        chained.others(),
        chained.couplings,
        {"format": "pt"},
        progress,
        dtype,
    )
    proof = json.loads((source / CERTIFICATE).read_text(encoding="utf-8"))
    places = _places_of_pages(original, source, proof)
    for name in listing(source)[0]:
        if name not in {CONFIG, INDEX, CERTIFICATE, *places.values(), *checkpoint.files}:
            copy(source / name, target / name)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write(target / CONFIG, dump({**config, "dtype": name_of(dtype)}))
    shutil.copymode(source / CONFIG, target / CONFIG)
    numbers = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names())
    fields = {
        "claim": "approximate" if integers else "exact",
        "stored": name_of(chained.matrices),
        "bytes_after": size,
        "bits_per_weight": 8 * size / numbers,
        "degrees_of_freedom": report.degrees_of_freedom,
        "nominal_bits": report.nominal_bits,
        "realised_bits": report.realised_bits,
        "corrections_bits": report.corrections_bits,
        "seed_bits": report.seed_bits,
        "groups": [vars(group) for group in report.groups],
    }
    proof["steps"].append({"rewrite": "bits-back", **fields, "bytes": size})
    proof |= {"dtype": name_of(dtype), "output_sha256": {WEIGHTS: sha256(target / WEIGHTS)}}
    write(target / CERTIFICATE, dump(proof))
    for name, text in page.pages(proof).items():
        write(target / places[name], text.encode())
    return Report("bits-back", fields)


def _places_of_pages(original: Path, folder: Path, proof: dict) -> dict[str, str]:
    """{page: the file of ``folder`` it stands in}: where ``original`` has one of that name, it is called otherwise."""
    taken, written, places = set(listing(original)[0]), set(listing(folder)[0]), {}
    for name in page.pages(proof):
        place = name
        while place in taken and f"gaugekit_{place}" in written:
            place = f"gaugekit_{place}"
        places[name] = place
    return places
