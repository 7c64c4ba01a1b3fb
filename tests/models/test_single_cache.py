"""What adapters say of layers that decode from their input: where weights stand, what a token takes in the cache."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from gaugekit.models import Live
from gaugekit.models.single_cache import input_cache, texts, value_cache
from single_cache_models import HEADS, TOKENS, bart, gemma4, gpt2, opt, whisper


@pytest.mark.parametrize("make", [gpt2, opt, bart, whisper])
def test_cuts_are_the_weights_of_the_view_and_no_copies(make):
    model = make().double()
    live = Live(model)
    layers = [layer for layer in range(len(live)) if live.family.outline(layer).causal]
    assert len(layers) == 2
    for layer in layers:
        view, layout = live.attention(layer), input_cache(live.family, layer)
        x = torch.randn(2, 3, 32, dtype=torch.float64)
        for part, cut in layout.cuts.items():
            module, seen = model.get_submodule(live.prefix + cut.path), getattr(view, part)
            weight, bias = cut.weight(module), cut.bias(module)
            assert torch.equal(weight, seen.weight.mT)
            assert weight.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
            assert (bias is None) == (seen.bias is None) and (bias is None or torch.equal(bias, seen.bias))
            y = torch.einsum("btd,hdk->bhtk", x, seen.weight)
            y = y if bias is None else y + seen.bias[:, None]
            torch.testing.assert_close(cut.apply(module, x), y)
        assert (layout.before, layout.after, layout.scale) == (64, 32, view.scale)
        attention = model.get_submodule(live.prefix + layout.attention)
        assert hasattr(attention, "layer_idx")
        assert layout.dropout is None or model.get_submodule(live.prefix + layout.dropout).p == 0.1


def test_what_stands_together_head_by_head_is_not_cut():
    sizes = {"hidden_size": 32, **HEADS, **TOKENS}
    live = Live(BloomForCausalLM(BloomConfig(**sizes)))
    with pytest.raises(ValueError, match="stand together head by head"):
        live.family.cuts(0)


def test_values_of_gemma4():
    (text,) = texts(gemma4()).values()
    layout = value_cache(text, 1)
    assert (layout.attention, layout.before, layout.after) == ("layers.1.self_attn", 64, 32)
    with pytest.raises(ValueError, match="sees the last tokens only"):
        value_cache(text, 0)
    assert texts(gpt2()) == {}
