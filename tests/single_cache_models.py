"""Small models of random weights whose layers can decode from one cached tensor, and what they generate."""

import dataclasses

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from gaugekit.hf.sas import SASConfig, SASForCausalLM

NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in NAMES else "past_key_values"
VOCABULARY, POSITIONS = 90, 640
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2}
SPEECH = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 3,
}  # fmt: skip
GLOBAL = {
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 2,
    "sliding_window": 6, "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip


def gpt2(**changes):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2LMHeadModel(GPT2Config(**sizes | TOKENS | changes))


def opt(**changes):
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": POSITIONS,
    }
    return OPTForCausalLM(OPTConfig(**sizes | HEADS | TOKENS | changes))


def gemma4(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": POSITIONS}
    return Gemma4ForCausalLM(Gemma4TextConfig(**sizes | HEADS | GLOBAL | TOKENS | changes))


def sas(**changes):
    return SASForCausalLM(SASConfig(hidden_size=32, intermediate_size=48, **HEADS | TOKENS | changes))


def bart(**changes):
    sizes = {"max_position_embeddings": POSITIONS, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(**sizes | SPEECH | TOKENS | changes))


def whisper(**changes):
    sizes = {"max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 8}
    none = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes | none | SPEECH | TOKENS | changes))


MAKERS = {"gpt2": gpt2, "opt": opt, "gemma4": gemma4, "sas": sas}
HOLDS = {"gemma4": "v"}  # the others "x"


def model(name, dtype=torch.float64, makers=MAKERS, **changes):
    """Weights so wide that attention is peaked, every bias and gain drawn too, so that none may be forgotten."""
    made = makers[name](**changes).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made.to(dtype)


def prompts(padded=True, columns=9):
    """ids [3, columns] and their mask, left-padded."""
    ids, mask = torch.randint(3, VOCABULARY, (3, columns)), torch.ones(3, columns, dtype=torch.int64)
    if padded:
        mask[1, :4], mask[2, : columns - 1] = 0, 0
    return ids * mask, mask


def generate(model, ids, mask, tokens=12, **options):
    """The generated sequences and the logits [B, tokens, vocabulary] of each step."""
    out = model.generate(
        ids, attention_mask=mask, **{"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True} | options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def stored_bytes(cache):
    """How many bytes a transformers cache holds of keys and values."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    return sum(
        x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values) if x is not None
    )
