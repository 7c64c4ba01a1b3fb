"""Small transformers models with random weights, and copies of them that are off by a known amount."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


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


def save_spread(model, path):
    """Saves ``model`` with a tokenizer, its matrices drawn so wide that its layers differ from each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    add_tokenizer(path)
    return path


def add_tokenizer(directory, letters="abcdefghijklmnopqrstuvwxyz"):
    """Saves a tokenizer beside the model: id 0 pads, 1 is any unknown character, then one id a letter."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{letter: 2 + index for index, letter in enumerate(letters)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        directory
    )
