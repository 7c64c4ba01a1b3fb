"""A SAS model takes the keywords that transformers passes under its old and new names, and refuses all others."""

import pytest
import torch
from transformers import DynamicCache

from gaugekit.hf.sas import CACHE, SASConfig, SASForCausalLM, SASForMaskedLM, SASModel

IDS = torch.arange(1, 15).reshape(2, 7)


def model(cls):
    made = cls(SASConfig(vocab_size=61, n_embd=16, n_layer=2, n_head=4, intermediate_size=24))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.double().eval()


@pytest.mark.parametrize("cls", [SASModel, SASForCausalLM, SASForMaskedLM])
def test_an_unknown_keyword_is_an_error_that_names_it(cls):
    made = model(cls)
    for name in ("token_type_ids", "inputs_embed", "head_mask", "cu_seq_lens_q"):
        with pytest.raises(TypeError, match=name):
            made(IDS, **{name: IDS})


@pytest.mark.parametrize("cls", [SASModel, SASForCausalLM])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_under_either_name(cls, name):
    made = model(cls)
    whole = made(IDS)[0]
    cache = DynamicCache(config=made.config)
    parts = [made(IDS[:, :4], **{name: cache})[0], made(IDS[:, 4:], **{name: cache})[0]]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 7
    out = made(IDS, use_cache=True)
    assert out[CACHE].get_seq_length() == 7 and CACHE not in made(IDS, use_cache=False)
    with pytest.raises(ValueError, match="expected one of them, got both"):
        made(IDS, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("cls", [SASForCausalLM, SASForMaskedLM])
def test_what_the_trainer_passes(cls):
    """The summed loss over ``num_items_in_batch``, which is the mean where that is the number of labels."""
    made = model(cls)
    mean = made(IDS, labels=IDS).loss
    count = 12 if cls is SASForCausalLM else 14  # a row's first token has nothing before it that predicts it
    torch.testing.assert_close(made(IDS, labels=IDS, num_items_in_batch=count).loss, mean)
    torch.testing.assert_close(made(IDS, labels=IDS, num_items_in_batch=2 * count).loss, mean / 2)
    assert isinstance(made(IDS, return_dict=False), tuple)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(keep):
    made = model(SASForCausalLM)
    rows = {0: slice(None), 1: slice(6, 7), 3: slice(4, 7)}.get(keep if isinstance(keep, int) else None, keep)
    torch.testing.assert_close(made(IDS, logits_to_keep=keep).logits, made(IDS).logits[:, rows])
