"""Llama and its kin: separate nn.Linear projections under layers.<l>.self_attn, rotary positions, shared key heads."""

from __future__ import annotations

from gaugekit.models import rope
from gaugekit.models.family import Read
from gaugekit.models.linears import Linears, NormLayout
from gaugekit.models.stream import Junction, Mlp, Stream
from gaugekit.models.view import NORMS, AttentionView

PER_HEAD = ("qwen3", "qwen3_moe", "gemma3_text")  # one gain that all heads share
WHOLE = ("olmo2", "olmo3")  # one norm over the channels of all heads
NORMED = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "chameleon")  # queries and keys have norms
NAMES = (
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", *NORMED, "olmo", "granite", "arcee", "starcoder2",
)  # fmt: skip
STREAMS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # one norm before attention, one before a plain gated MLP, no more
# The parts with biases where no config entry has a say
BIASED = {"qwen2": "qkv", "mistral": "", "ministral": "", "mixtral": ""}
# Of others (the entry that switches biases on, the parts that then have one, what holds where the entry is missing)
SWITCHES = {"starcoder2": ("use_bias", "qkvo", True), "qwen2_moe": ("qkv_bias", "qkv", True)}
BEHIND = "model: its stream cannot be sliced: norms over all D channels stand behind its parts, where slicing has none"
SWITCH = ("attention_bias", "qkvo", False)


class Llama(Linears):
    """Decoders of the model types in ``NAMES``: every channel of a head is turned by position."""

    names = NAMES
    ties = False  # whether the head shares the table of tokens where the config does not say
    anchor = "layers.0.self_attn.o_proj.weight"

    @property
    def base(self) -> float:
        """That of the angles, where the config gives none."""
        return {"mixtral": 1_000_000.0, "olmo3": 500_000.0}.get(self.name, 10_000.0)

    def check(self) -> None:
        heads, groups, width = self.heads("q"), self.heads("k"), self.head_width
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of {heads} heads, got {groups}")
        if width % 2:
            raise ValueError(f"head_dim: expected an even number under rotary positions, got {width}")
        self.refuse_short("layer_types")
        if self.config.get("clip_qkv") is not None:
            raise ValueError(
                f"clip_qkv: expected null, got {self.config['clip_qkv']}: queries, keys and values that are cut off "
                "at a number leave no group"
            )

    def block(self, layer: int) -> str:
        return f"layers.{layer}"

    def projections(self, layer: int) -> dict[str, str]:
        return {part: f"{self.block(layer)}.self_attn.{part}_proj" for part in "qkvo"}

    def heads(self, part: str) -> int:
        heads = self.config["num_attention_heads"]
        return (self.config.get("num_key_value_heads") or heads) if part in "kv" else heads

    def biased(self, part: str) -> bool:
        if self.name in BIASED:
            return part in BIASED[self.name]
        entry, parts, default = SWITCHES.get(self.name, SWITCH)
        return part in parts and bool(self.config.get(entry, default))

    @property
    def scale(self) -> float:
        """What multiplies the scores."""
        if self.name == "granite":
            return float(self.config.get("attention_multiplier", 1.0))
        return self.head_width**-0.5

    @property
    def normed(self) -> bool:
        """Whether queries and keys have norms."""
        return self.name in NORMED

    def rotary(self, layer: int) -> int:
        """How many channels of a head turn in this layer."""
        return self.head_width

    def rotary_base(self, layer: int) -> float:
        """The base of the angles in this layer."""
        return rope.base(self.config, self.base, kind=self.kind(layer))

    def kind(self, layer: int) -> str | None:
        """What the config calls the layer, where it has layers of several kinds."""
        kinds = self.config.get("layer_types")
        return kinds[layer] if kinds else None

    def attention(self, layer: int, read: Read) -> AttentionView:
        barred = dict.fromkeys(("query_key", "key_bias"), NORMS) if self.normed else {}
        return AttentionView(
            **self.parts(layer, read),
            scale=self.scale,
            rotary=self.rotary(layer),
            causal=True,
            rotary_base=self.rotary_base(layer),
            barred=barred,
        )

    def norms(self, layer: int) -> NormLayout | None:
        """RMSNorms of each head with one gain for all heads, or in OLMo of all heads at once."""
        width, whole = self.head_width, self.name in WHOLE
        if self.name not in (*PER_HEAD, *WHOLE):
            return None
        shapes = {
            part: {
                f"{self.block(layer)}.self_attn.{part}_norm.weight": (
                    self.heads(part) * width if whole else width,
                )
            }
            for part in "qk"
        }
        offset = 1.0 if self.name == "gemma3_text" else 0.0
        eps = self.config.get("rms_norm_eps", 1e-5 if whole else 1e-6)
        return NormLayout(shapes, eps, offset, whole=whole)

    def recomputed(self, name: str) -> bool:
        return name.endswith(".self_attn.rotary_emb.inv_freq")

    @property
    def behind(self) -> bool:
        """Whether norms stand behind attention and MLP, on what goes into the stream."""
        return self.name in WHOLE

    @property
    def unsliced(self) -> str | None:
        return BEHIND if self.behind else None

    def stream(self) -> Stream:
        return self.whole_stream() if self.name in STREAMS else super().stream()

    def streams(self) -> tuple[Stream, ...]:
        return (self.whole_stream(),) if self.behind else super().streams()

    def whole_stream(self, offset: float = 0.0) -> Stream:
        """From the table of tokens to the head; norms multiply by ``offset`` and their weight."""
        return Stream(
            size=self.size,
            junctions=tuple(self.junctions(self.block(layer)) for layer in range(self.layers)),
            tokens="embed_tokens",
            positions=None,
            norm="norm",
            head="lm_head",
            tied=bool(self.config.get("tie_word_embeddings", self.ties)),
            eps=self.config.get("rms_norm_eps", 1e-6),
            centred=False,
            offset=offset,
        )

    def junctions(self, block: str) -> tuple[Junction, Junction]:
        """Of the block of that path."""
        before = ("input_layernorm", "post_attention_layernorm", None, None)
        behind = (None, None, "post_attention_layernorm", "post_feedforward_layernorm")
        return self.around(block, *(behind if self.behind else before))

    def around(self, block: str, *norms: str | None) -> tuple[Junction, Junction]:
        """Attention and MLP with ``norms``: before the one, before the other, behind the one, behind the other."""
        q, k, v, o = (f"{block}.self_attn.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{block}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        activation = self.config.get("hidden_activation") or self.config.get("hidden_act", "silu")
        mlp = Mlp(up, down, activation, gate)
        first, second, third, fourth = (name and f"{block}.{name}" for name in norms)
        return (
            Junction(first, (q, k, v), (o,), after=third),
            Junction(second, (gate, up), (down,), mlp, after=fourth),
        )
