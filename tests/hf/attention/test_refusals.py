"""What shaped attention does not cover is refused with the reason, never computed wrongly."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from gaugekit.hf.attention import interface
from tiny import bert, gpt2

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
IDS = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture(autouse=True)
def registered():
    interface.register()
    interface.register()  # a second time is no error


def refused(message, model, ids=IDS, **inputs):
    model.set_attn_implementation("gaugekit")
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, **inputs)


def test_dropout():
    refused("dropout: expected 0, got 0.1; .*model.eval", gpt2().train())


def test_attention_weights():
    refused("output_attentions: .*'eager'", bert(), output_attentions=True)


def test_a_mask_made_by_the_user():
    mask = torch.zeros(2, 1, 12, 12)
    refused(
        r"attention_mask: expected a 2D mask of real tokens, got one of shape \[2, 1, 12, 12\]",
        gpt2(),
        attention_mask=mask,
    )


def test_a_mask_for_other_keys():
    mask = interface.Visible(keys=9, causal=True)
    x = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="made for 9 keys, but there are 12"):
        interface.attend(torch.nn.Module(), x, x, x, mask)


@pytest.mark.parametrize("name", ["indices", "sinks", "block_indices", "cu_seq_lens_q", "no_such_thing"])
def test_an_argument_that_may_change_the_result(name):
    x = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match=f"{name}: shaped attention does not cover it; .*'sdpa'"):
        interface.attend(torch.nn.Module(), x, x, x, None, **{name: torch.zeros(2)})
    told = dict(position_ids=torch.zeros(2), output_attentions=False, num_items_in_batch=3)
    out, _ = interface.attend(torch.nn.Module(), x, x, x, None, **told, **{name: None})
    assert out.shape == (1, 12, 2, 8)
    with pytest.raises(ValueError, match=f"{name}: a mask without an array"):
        interface.visible(1, 12, 12, **{name: 3})


def test_a_model_that_reads_its_mask():
    mask = interface.visible(1, 12, 12, allow_is_causal_skip=False)
    for read in (
        lambda: mask[:, :, :4],
        lambda: mask.dtype,
        lambda: torch.where(mask, 0, 1),
        lambda: torch.ones(2) + mask,
    ):
        with pytest.raises(ValueError, match="attention_mask: expected to be handed to the attention only"):
            read()
    assert not hasattr(mask, "device")


def test_causal_queries_of_which_nobody_says_where_they_stand():
    q, x = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="where 5 causal queries stand among 12 keys"):
        interface.attend(torch.nn.Module(), q, x, x, None)
    interface.attend(torch.nn.Module(), q, x, x, None, is_causal=False)


def test_a_window_over_holes():
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()
    refused("padding at one end only", model, attention_mask=torch.tensor([[1, 0, 1, 1] * 3] * 2))


def test_a_window_that_no_mask_holds():
    x = torch.randn(1, 2, 12, 8)
    with pytest.raises(ValueError, match="one that holds the sliding window"):
        interface.attend(torch.nn.Module(), x, x, x, None, sliding_window=4)


def test_chunked_attention():
    config = Llama4TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        attention_chunk_size=4,
        num_local_experts=1,
        intermediate_size_mlp=48,
    )
    refused("got the custom pattern", Llama4ForCausalLM(config).eval())


def test_scores_that_are_changed_on_the_way():
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)).eval()
    refused("softcap: shaped attention does not cover it", gemma)
    sinks = GptOssForCausalLM(
        GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    ).eval()
    refused("s_aux: shaped attention does not cover it", sinks)
