"""A tiny model of every family whose residual stream can be sliced, with random gains and biases; a text beside it."""

import torch
import transformers
from torch import nn

from tiny import add_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs, said he. "
SHARED = dict(vocab_size=60, bos_token_id=0, eos_token_id=1, pad_token_id=0)
LLAMA = dict(
    SHARED,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)
OPT = dict(
    SHARED, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
    max_position_embeddings=64,
)  # fmt: skip
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, bos_token_id=0, eos_token_id=1,
            attn_pdrop=0.0, embd_pdrop=0.0)  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
FAMILIES = {
    "llama": ("Llama", {**LLAMA, "rope_parameters": ROPE}),
    "llama tied": ("Llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 6}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "opt untied": ("OPT", {**OPT, "tie_word_embeddings": False}),
    "phi": ("Phi", {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "max_position_embeddings": 64}),
}  # fmt: skip
HEADS = {"GPT2": "GPT2LMHeadModel"}


def build(name, **changes):
    """A float64 model, every number random: no zero hides an error."""
    family, sizes = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            gain = path.endswith("weight") and ("norm" in path or "ln_" in path)
            parameter.normal_(1.0 if gain else 0.0, 0.3)
    return model.double().eval()


def save(name, folder, **changes):
    """``build`` in a directory, with a tokenizer and calibration text beside it: (directory, text)."""
    build(name, **changes).save_pretrained(folder / "model")
    add_tokenizer(folder / "model")
    (folder / "text.txt").write_text(WORDS * 12)
    return folder / "model", folder / "text.txt"


class Norm(nn.Module):
    """RMSNorm in the dtype of its input: transformers' own computes in float32, whatever it is given."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact(model):
    """``model`` with norms that keep float64."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(path, Norm(module))
    return model


def ids(rows=2, length=12):
    """Token ids [rows, length]."""
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(1))
