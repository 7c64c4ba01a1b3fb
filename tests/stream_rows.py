"""Tiny models whose streams are more than a decoder's: what their groups come to by hand, random weights, inputs.

D = 4, two heads of width 2, three hidden units in an MLP; one layer a stack, but two in towers, where what one token
alone is read of would see too little of a first one. LayerNorms subtract the mean.
"""

import torch
import transformers
from torch import nn

from sliceable import Norm

TOKENS = dict(vocab_size=13, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
T5 = dict(
    TOKENS, d_model=4, d_kv=2, d_ff=3, num_layers=1, num_heads=2, relative_attention_num_buckets=4,
    relative_attention_max_distance=4,
)  # fmt: skip
WHISPER = dict(
    TOKENS, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=3, decoder_ffn_dim=3, num_mel_bins=2, max_source_positions=5, max_target_positions=6,
    begin_suppress_tokens=None, suppress_tokens=None, classifier_proj_size=3, num_labels=5,
)  # fmt: skip
BART = dict(
    TOKENS, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=3, decoder_ffn_dim=3, max_position_embeddings=6, activation_function="gelu",
    scale_embedding=False,
)  # fmt: skip
TOWER = dict(hidden_size=4, num_attention_heads=2, num_hidden_layers=2, intermediate_size=3)
IMAGE = dict(TOWER, image_size=4, patch_size=2, num_channels=1)
LABELS = dict(
    IMAGE, num_labels=3, layer_norm_eps=1e-3
)  # four patches of four numbers; a length that can be seen
DINO = dict(LABELS, mlp_ratio=1)
TEXT = dict(TOWER, vocab_size=13, max_position_embeddings=6, bos_token_id=0, eos_token_id=12)
BOTH = dict(text_config=TEXT, vision_config=IMAGE, projection_dim=3)
GEMMA = dict(
    {**TOWER, "num_hidden_layers": 1}, vocab_size=11, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    num_key_value_heads=1, head_dim=2, query_pre_attn_scalar=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10.0},
)  # fmt: skip
GEMMA_3 = {k: v for k, v in GEMMA.items() if k != "rope_parameters"}
OLMO = {k: v for k, v in GEMMA.items() if k not in ("head_dim", "query_pre_attn_scalar")}

ALL = {"value_output": 8, "query_key": 8, "key_bias": 4, "value_bias": 4}
IN_T5 = {"norm_gains": 6 * 4, "neuron_scales": 2 * 3}
# Positions; what writes in attention and in the MLP; what reads there
IN_WHISPER = {"norm_gains": 3 * 4, "norm_biases": 3 * 4}
WRITES, READS = 5 + 4, 12 + 3
PICTURE = {"norm_gains": 5 * 4, "norm_biases": 5 * 4, "stream_rotation": 3}
PROJECTED = {"norm_gains": 5 * 4, "norm_biases": 4 * 4, "stream_offsets": 3}
IN_BART = {"norm_gains": 6 * 4, "norm_biases": 6 * 4}
KIN = 2 * (WRITES + READS) + 5 + 4 + 8  # of cross-attention a writer, a query, keys and values
EVERY = {group: 3 * size for group, size in ALL.items()}
TWO = 2 * (WRITES + READS)
TWICE = {group: 2 * size for group, size in ALL.items()}
# name: (model, config, sizes, the groups of all attention together, those of each stream)
MODELS = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {"value_output": 24, "query_key": 24}, [IN_T5]),
    "t5, untied": (
        "T5ForConditionalGeneration", "T5Config", T5, {"value_output": 24, "query_key": 24},
        [{**IN_T5, "norm_gains": 7 * 4, "stream_rotation": 6}],
    ),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5, {"value_output": 24, "query_key": 24}, [IN_T5]),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5, {"value_output": 24, "query_key": 24}, [IN_T5]),
    "t5's encoder": (
        "T5ForTokenClassification", "T5Config", {**T5, "num_labels": 3}, {"value_output": 8, "query_key": 8},
        [{"norm_gains": 12, "neuron_scales": 3, "stream_rotation": 6}],
    ),
    # keys have no bias; the encoder's last norm is read by keys and values of the decoder
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        {"value_output": 24, "query_key": 24, "value_bias": 12},
        [{**IN_WHISPER, "stream_means": 5 + WRITES + READS + 8},
         {**IN_WHISPER, "stream_means": 6 + 5 + WRITES + READS + 4}],
    ),
    # tied; positions of both sides, in mBART two more a side; a mean of each first norm's bias
    "blenderbot": (
        "BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, EVERY, [{**IN_BART, "stream_means": 12 + KIN}],
    ),
    "blenderbot, bare": (
        "BlenderbotModel", "BlenderbotConfig", BART, EVERY,
        [{**IN_BART, "stream_means": 13 + 12 + KIN, "stream_offsets": 3}],
    ),
    "pegasus": (
        "PegasusForConditionalGeneration", "PegasusConfig", BART, EVERY, [{**IN_BART, "stream_means": 12 + KIN}],
    ),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", BART, EVERY, [{**IN_BART, "stream_means": KIN}]),
    "mbart": (
        "MBartForConditionalGeneration", "MBartConfig", BART, EVERY, [{**IN_BART, "stream_means": 16 + 2 + KIN}],
    ),
    "whisper's encoder": (
        "WhisperForAudioClassification", "WhisperConfig", WHISPER,
        {"value_output": 8, "query_key": 8, "value_bias": 4}, [{**IN_WHISPER, "stream_means": 5 + WRITES + READS + 3}],
    ),
    "vit": (
        "ViTForImageClassification", "ViTConfig", LABELS, TWICE,
        [{**PICTURE, "stream_means": 1 + 5 + 5 + TWO + 3, "stream_offsets": 2 * 3}],
    ),
    "deit": (
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", LABELS, TWICE,
        [{**PICTURE, "stream_means": 2 + 6 + 5 + TWO + 6, "stream_offsets": 3 * 3}],
    ),
    # four hidden units; a token for masks; the head reads two vectors
    "dinov2": (
        "Dinov2ForImageClassification", "Dinov2Config", DINO, TWICE,
        [{**PICTURE, "stream_means": 2 + 5 + 5 + 2 * (10 + 16) + 6, "stream_offsets": 2 * 3, "layer_scales": 16}],
    ),
    # eight hidden units with gates; a register
    "dinov2, registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
        {**DINO, "use_swiglu_ffn": True, "num_register_tokens": 1}, TWICE,
        [{**PICTURE, "stream_means": 3 + 5 + 5 + 2 * (14 + 28) + 6, "stream_offsets": 2 * 3, "layer_scales": 16,
          "neuron_scales": 16}],
    ),
    "siglip's images": (
        "SiglipForImageClassification", "SiglipConfig", {**BOTH, "num_labels": 3}, TWICE,
        [{**PICTURE, "stream_means": 4 + 5 + TWO + 3, "stream_offsets": 3}],
    ),
    # its first norm has a bias, whose mean nobody sees, and gains that no rotation passes; a head without a bias
    "clip's images": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, "projection_dim": 3}, TWICE,
        [{**PROJECTED, "stream_means": 1 + 5 + 1 + 4 + TWO}],
    ),
    "clip's text": (
        "CLIPTextModelWithProjection", "CLIPTextConfig", {**TEXT, "projection_dim": 3}, TWICE,
        [{**PROJECTED, "stream_means": 13 + 6 + TWO, "stream_rotation": 3}],
    ),
    "clip": (
        "CLIPModel", "CLIPConfig", BOTH, {group: 2 * size for group, size in TWICE.items()},
        [{**PROJECTED, "stream_means": 13 + 6 + TWO, "stream_rotation": 3},
         {**PROJECTED, "stream_means": 1 + 5 + 1 + 4 + TWO}],
    ),
    # keys and values of the pooling read the images' last norm
    "siglip": (
        "SiglipModel", "SiglipConfig", BOTH, {group: 2 * size for group, size in TWICE.items()},
        [{**PICTURE, "stream_means": 13 + 6 + TWO + 4, "stream_offsets": 3},
         {**PICTURE, "stream_means": 4 + 5 + TWO + 8, "stream_offsets": 3}],
    ),
    "gemma": (
        "GemmaForCausalLM", "GemmaConfig", GEMMA, {"value_output": 4, "rotary_pairs": 2},
        [{"norm_gains": 8, "neuron_scales": 3}],
    ),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", GEMMA, {"value_output": 4, "rotary_pairs": 2},
        [{"norm_gains": 8, "neuron_scales": 3}],
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA_3, {"value_output": 4, "query_key_gains": 1},
        [{"norm_gains": 8, "neuron_scales": 3}],
    ),
    "olmo2": (
        "Olmo2ForCausalLM", "Olmo2Config", OLMO, {"value_output": 4, "query_key_gains": 1},
        [{"norm_gains": 4, "neuron_scales": 3}],
    ),
}  # fmt: skip


def build(name, seed=0):
    """A float64 model of ``MODELS``, every number random."""
    kind, config, sizes, _, _ = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    if name == "t5, untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and path.endswith(("weight", "lambda1"))
            parameter.normal_(1.0 if gain else 0.0, 0.3 if gain else 0.8)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            model.set_submodule(path, Offset(module) if "Gemma" in type(module).__name__ else Norm(module))
    return model.double().eval()


class Offset(nn.Module):
    """Gemma's RMSNorm in the dtype of its input, which multiplies by one and its weight."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def inputs(model, rows=40):
    """Seeded random inputs of all positions there are."""
    generator = torch.Generator().manual_seed(1)
    config, kind = model.config, type(model).__name__

    def normal(*shape):
        return torch.randn(rows, *shape, dtype=torch.float64, generator=generator)

    def ids(count, length=6):
        return torch.randint(0, count, (rows, length), generator=generator)

    if "Whisper" in kind:
        read = {"input_features": normal(2, 10)}
    elif model.main_input_name == "pixel_values":
        read = {"pixel_values": normal(1, 4, 4)}
    elif "CLIP" in kind or "Siglip" in kind:
        text = ids(12)
        text[torch.arange(rows), torch.randint(3, 6, (rows,), generator=generator)] = 12  # where a text ends
        read = {"input_ids": text} | (
            {"pixel_values": normal(1, 4, 4)} if hasattr(model, "vision_model") else {}
        )
    else:
        read = {"input_ids": ids(config.vocab_size)}
    if kind.endswith(("ConditionalGeneration", "BlenderbotModel")):
        read["decoder_input_ids"] = ids(config.vocab_size)
    return read


def output(answer):
    """Logits, what a tower projects, or the last hidden states."""
    names = ("logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")
    return next(answer[name] for name in names if name in answer)
