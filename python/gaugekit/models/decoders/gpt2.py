"""GPT-2: one fused projection c_attn for q, k and v (Conv1D: weight [in, out]) and c_proj, under h.<l>.attn."""

from __future__ import annotations

import re

import torch

from gaugekit.models.family import Family, Read, bias_or_zeros, join, linear, split
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import AttentionView, Compact, Projection, Stored


class Gpt2(Family):
    """Decoders of model_type "gpt2"."""

    names = ("gpt2",)
    anchor = "h.0.attn.c_proj.weight"

    def check(self) -> None:
        self.refuse_odd_heads()
        size, heads = self._sizes()
        if size % heads:
            raise ValueError(f"n_embd: expected a multiple of n_head={heads}, got {size}")

    @property
    def layers(self) -> int:
        return self.config["n_layer"]

    def block(self, layer: int) -> str:
        return f"h.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        fused = f"{self.block(layer)}.attn.c_attn"
        return {"q": fused, "k": fused, "v": fused, "o": f"{self.block(layer)}.attn.c_proj"}

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        size, _ = self._sizes()
        paths = self.projections(layer)
        return {
            f"{paths['q']}.weight": (size, 3 * size),
            f"{paths['q']}.bias": (3 * size,),
            f"{paths['o']}.weight": (size, size),
            f"{paths['o']}.bias": (size,),
        }

    def attention(self, layer: int, read: Read) -> AttentionView:
        size, heads = self._sizes()
        paths = self.projections(layer)
        tensors = self.take(layer, read)
        weights = tensors[f"{paths['q']}.weight"].chunk(3, dim=1)
        biases = tensors[f"{paths['q']}.bias"].chunk(3)
        q, k, v = (
            Projection(split(weight, heads), bias.unflatten(0, (heads, -1)))
            for weight, bias in zip(weights, biases, strict=True)
        )
        o = Projection(
            tensors[f"{paths['o']}.weight"].unflatten(0, (heads, -1)), tensors[f"{paths['o']}.bias"]
        )
        scale = (size // heads) ** -0.5 if self.config.get("scale_attn_weights", True) else 1.0
        if self.config.get("scale_attn_by_inverse_layer_idx"):
            scale /= layer + 1
        return AttentionView(q, k, v, o, scale=scale, causal=True)

    def store(self, layer: int, view: AttentionView, compact: dict[str, Compact] | None = None) -> Stored:
        compact = compact or {}
        paths = self.projections(layer)
        tensors, modules = {}, {}
        fused = {part: getattr(view, part) for part in "qkv"}
        if any(part in compact for part in fused):
            # The three are no longer of one kind: a concatenation of forms, its parts under 0, 1, 2.
            parts = [compact.get(part) or linear(projection) for part, projection in fused.items()]
            for index, part in enumerate(parts):
                tensors |= {f"{paths['q']}.{index}.{name}": tensor for name, tensor in part.tensors.items()}
            modules[paths["q"]] = {"form": "concat", "arguments": {"parts": [part.spec for part in parts]}}
        else:
            weights = [join(projection.weight) for projection in fused.values()]
            biases = [
                bias_or_zeros(projection.bias, weight.shape[1])
                for projection, weight in zip(fused.values(), weights, strict=True)
            ]
            tensors[f"{paths['q']}.weight"] = torch.cat(weights, 1)
            tensors[f"{paths['q']}.bias"] = torch.cat(biases)
        if "o" in compact:
            tensors |= {f"{paths['o']}.{name}": tensor for name, tensor in compact["o"].tensors.items()}
            modules[paths["o"]] = compact["o"].spec
        else:
            weight = view.o.weight.flatten(0, 1)
            tensors[f"{paths['o']}.weight"] = weight.contiguous()
            tensors[f"{paths['o']}.bias"] = bias_or_zeros(view.o.bias, weight.shape[1])
        return Stored(tensors, modules)

    def stream(self) -> Stream:
        blocks = [self.block(layer) for layer in range(self.layers)]
        activation = self.config.get("activation_function", "gelu_new")
        return Stream(
            size=self._sizes()[0],
            junctions=tuple(
                (
                    Junction(f"{block}.ln_1", (f"{block}.attn.c_attn",), (f"{block}.attn.c_proj",)),
                    Junction(
                        f"{block}.ln_2",
                        (f"{block}.mlp.c_fc",),
                        (f"{block}.mlp.c_proj",),
                        Mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", activation),
                    ),
                )
                for block in blocks
            ),
            tokens="wte",
            positions="wpe",
            norm="ln_f",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", True)),
            eps=self.config.get("layer_norm_epsilon", 1e-5),
            centred=True,
            transposed=True,
            dropouts=("resid_pdrop",),
        )

    def recomputed(self, name: str) -> bool:
        return re.search(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$", name) is not None

    def _sizes(self) -> tuple[int, int]:
        return self.config["n_embd"], self.config["n_head"]
