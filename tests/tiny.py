"""Small transformers models with random weights, and copies of them that are off by a known amount."""

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel


def bert(cls=BertModel, **changes):
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=90
    )
    return cls(BertConfig(**{**sizes, **changes})).eval()


def gpt2(**changes):
    sizes = dict(
        n_embd=32, n_layer=2, n_head=4, vocab_size=90, n_positions=48, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


def copy_of(model, amount=0.0):
    """A model of the same weights, each number off by a relative ``amount`` of noise."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + amount * torch.randn_like(parameter))
    return other
