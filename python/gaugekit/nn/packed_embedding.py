"""An embedding whose table stays packed in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from gaugekit.nn.packed_layer import PackedMatrixLayer
from gaugekit.nn.packed_matrix import PackedMatrix
from gaugekit.ops.packed_linear.weight import packed_rows


class PackedEmbedding(PackedMatrixLayer, nn.Embedding):
    """rows = W[ids], W [``count``, ``width``] frozen in the layout of docs/resident.md; only rows asked for decode.

    ids int64 or int32 [...] -> [..., width] in W's dtype; ValueError for ids of another dtype. A tied head is
    ``PackedLinear.from_parts(embedding.packed)``: one packed weight for both. It is an nn.Embedding, so that whoever
    counts or looks for embeddings finds it (transformers' ``num_parameters(exclude_embeddings=True)``).
    """

    form = "packed_embedding"

    def __init__(self, count: int, width: int, padding_idx: int | None = None, weights: str = "bfloat16",
                 matrix: PackedMatrix | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(matrix, count, width, weights, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = count, width, padding_idx
        # what nn.Embedding has besides, so that this layer can be made one again
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> PackedEmbedding:
        """The packed twin of ``embedding``, which is left as it is. ValueError for weights that are not bf16, fp16 or
        float8_e5m2, or for ``max_norm``, which would change them."""
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected one without max_norm, got max_norm={embedding.max_norm}")
        matrix = PackedMatrix.of(embedding.weight)
        return cls(*matrix.shape, embedding.padding_idx, str(matrix.dtype).split(".")[1], matrix)

    def to_embedding(self) -> nn.Embedding:
        """A plain embedding with a copy of the table, bit for bit."""
        return nn.Embedding(*self.weight.shape, self.padding_idx, _weight=self.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(self.weight, PackedMatrix):
            return embedding(ids, self.weight, self.padding_idx)
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids: expected int64 or int32, got {ids.dtype}")
        return packed_rows(ids.flatten().long(), self.weight.value).view(*ids.shape, self.weight.shape[1])
