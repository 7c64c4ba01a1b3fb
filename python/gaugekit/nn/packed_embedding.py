"""An embedding whose table stays packed in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.packed_linear_weight import packed_rows, unpack_weight


class PackedEmbedding(nn.Module):
    """rows = W[ids], W [``count``, ``width``] frozen in the layout of docs/packed.md; only rows asked for are decoded.

    ids int64 [...] -> [..., width] in W's dtype. A tied head is ``PackedLinear.from_parts(embedding.packed)``: one
    packed weight for both.
    """

    form = "packed_embedding"

    def __init__(self, count: int, width: int, padding_idx: int | None = None, weights: str = "bfloat16",
                 matrix: PackedMatrix | None = None, device=None, dtype=None):  # fmt: skip
        super().__init__()
        if weights not in ("bfloat16", "float16"):
            raise ValueError(f"weights: expected bfloat16 or float16, got {weights!r}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = count, width, padding_idx
        self.packed = (
            PackedMatrix(count, width, getattr(torch, weights), device) if matrix is None else matrix
        )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> PackedEmbedding:
        """The packed twin of ``embedding``, which is left as it is. ValueError for weights that are not bf16 or fp16,
        or for ``max_norm``, which would change them."""
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected one without max_norm, got max_norm={embedding.max_norm}")
        matrix = PackedMatrix.of(embedding.weight)
        kind = str(matrix.value.dtype).split(".")[1]
        return cls(*matrix.value.shape, embedding.padding_idx, kind, matrix)

    def to_embedding(self) -> nn.Embedding:
        """A plain embedding with the table bit for bit."""
        return nn.Embedding(*self.packed.value.shape, self.padding_idx, _weight=self.weight)

    @property
    def weight(self) -> Tensor:
        """W, unpacked anew each time it is asked for."""
        return unpack_weight(self.packed.value)

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed table."""
        return self.packed.value.bytes

    def forward(self, ids: Tensor) -> Tensor:
        return packed_rows(ids.flatten().long(), self.packed.value).view(*ids.shape, self.embedding_dim)
