"""SAS models in transformers: Auto classes, files, generation, masks; every kind of block."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    StaticCache,
)

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit.hf.sas import SASConfig, SASForCausalLM, SASForMaskedLM, SASModel
from helpers import assert_accurate

KINDS = {
    "sas": {},
    "sas_p": {"block": "sas_p"},
    "no norm": {"block": "sas_p", "norm": "none"},
    "skipless": {"block": "skipless", "norm": "none", "values": True, "outputs": True, "queries": False},
    "pre_ln": {"block": "pre_ln", "num_key_value_heads": 2},
    "groups rope": {"num_key_value_heads": 2, "rope": True, "key_width": 6},
    "window": {"sliding_window": 3, "hidden_act": "geglu"},
}


def model(kind="sas", cls=SASForCausalLM, dtype=torch.float64, **changes):
    sizes = dict(vocab_size=61, n_embd=16, n_layer=3, n_head=4, intermediate_size=24, pad_token_id=0)
    made = cls(SASConfig(**(sizes | KINDS[kind] | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.to(dtype).eval()


def batch(lengths, side, width=None):
    """Random tokens, padded with 0 on one side, and their mask."""
    width = max(lengths) if width is None else width
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(1, 61, (length,))
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_auto_classes(kind, tmp_path):
    for cls, auto in ((SASForCausalLM, AutoModelForCausalLM), (SASForMaskedLM, AutoModelForMaskedLM)):
        made = model(kind, cls, torch.float32)
        made.save_pretrained(tmp_path / cls.__name__)
        loaded = auto.from_pretrained(tmp_path / cls.__name__)
        assert type(loaded) is cls and loaded.config.causal == (cls is SASForCausalLM)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert made.state_dict().keys() == loaded.state_dict().keys()
        ids = torch.randint(1, 61, (2, 7))
        assert torch.equal(loaded(ids).logits, made(ids).logits)
        base = AutoModel.from_pretrained(tmp_path / cls.__name__)
        assert type(base) is SASModel
        assert torch.equal(base(ids).last_hidden_state, made.model(ids).last_hidden_state)


def test_starting_values_are_the_papers(tmp_path):
    config = SASConfig(vocab_size=61, n_embd=64, n_layer=8, n_head=4)
    assert config.beta_ff == pytest.approx(0.15) and config.num_key_value_heads == 4
    made = SASForCausalLM(config)
    made.save_pretrained(tmp_path)
    for found in (made, AutoModelForCausalLM.from_pretrained(tmp_path)):
        blocks = found.model.layers
        for block in blocks:
            attention = block.attention
            assert not attention.query.weight.any() and attention.key.weight.std().item() < 0.03
            assert all((getattr(attention, name) == 1).all() for name in ("alpha", "beta", "gamma"))
            assert block.beta_ff.item() == pytest.approx(0.15) and (block.norm.weight == 1).all()
        assert blocks[0].attention.value is not None and blocks[1].attention.value is None
        assert found.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", [SASForCausalLM, SASForMaskedLM])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, cls, side):
    made = model(kind, cls)
    lengths = [7, 3, 1]
    ids, mask = batch(lengths, side)
    out = made(ids, attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        real = mask[row].bool()
        alone = made(ids[row, real][None], output_hidden_states=True)
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, real], theirs[0], rtol=1e-10, atol=1e-10)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1] @ made.lm_head.weight.T, out.logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_the_full_forward(kind, side, dtype):
    """Prefill in chunks, then token by token, with padding on either side of the prompt."""
    made = model(kind, dtype=dtype)
    wide = copy.deepcopy(made).double()
    lengths = [6, 2, 4]
    ids, mask = batch(lengths, side)
    more = torch.randint(1, 61, (3, 4))
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    cache, parts, begin = DynamicCache(config=made.config), [], 0
    with torch.no_grad():
        for columns in (2, 4, 1, 1, 2):
            end = begin + columns
            out = made(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            parts.append(out.logits)
            begin = end
        assert cache.get_seq_length() == 10
        logits, padded = torch.cat(parts, dim=1), made(ids, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            alone = ids[row, real][None]
            # in float64 the plain result would be the reference itself: padding shows what rounding costs there
            plain = padded[row, real] if dtype == torch.float64 else made(alone).logits[0]
            assert_accurate(logits[row, real], wide(alone).logits[0], plain, ulps=16)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind, options):
    """Greedy and beams, on a left-padded batch: each row as it would go alone, without a cache."""
    made = model(kind)
    ids, mask = batch([7, 2], "left")
    out = made.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    for row in range(2):
        alone = ids[row, mask[row].bool()][None]
        options.pop("prefill_chunk_size", None)
        expected = made.generate(alone, max_new_tokens=6, do_sample=False, use_cache=False, **options)
        assert out[row, 7:].tolist() == expected[0, alone.shape[1] :].tolist()


def test_sampling_and_several_answers():
    made = model()
    ids, mask = batch([4, 2], "left")
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    out = made.generate(ids, **options)
    torch.manual_seed(3)
    assert out.shape == (6, 9) and torch.equal(out, made.generate(ids, use_cache=False, **options))


def test_speculative_decoding_rolls_the_cache_back():
    made, assistant = model(), model("sas_p")
    ids, _ = batch([5], "left")
    plain = made.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(
        made.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=assistant), plain
    )


def test_a_cache_that_knows_no_running_sum_is_refused():
    made = model()
    ids, mask = batch([4], "left")
    for cache in (DynamicCache(), StaticCache(config=AutoConfig.for_model("gpt2"), max_cache_len=8)):
        with pytest.raises(
            ValueError, match=r"(cache|past_key_values): expected DynamicCache\(config=model.config\)"
        ):
            made(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation"):
        made.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(
        ValueError, match=r"attention_mask: expected \[B, past \+ T\] = \[1, 4\], got \[1, 3\]"
    ):
        made(ids, attention_mask=mask[:, :3])
    with pytest.raises(ValueError, match="output_attentions"):
        made(ids, output_attentions=True)
    with pytest.raises(ValueError, match="input_ids"):
        made()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "post_ln"}, "block: expected one of sas, sas_p, skipless, pre_ln; got 'post_ln'"),
        ({"n_head": 7}, "heads: expected a divisor of width = 768, got 7"),
        ({"norm": "none"}, "norm"),
        ({"activation": "tanh"}, "activation"),
        ({"n_layer": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"sliding_window": 0}, "window"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        SASConfig(**options)


def test_a_head_and_its_direction_must_agree():
    with pytest.raises(ValueError, match="causal: expected True or None for SASForCausalLM, got False"):
        SASForCausalLM(SASConfig(causal=False))
    with pytest.raises(ValueError, match="causal: expected False or None for SASForMaskedLM, got True"):
        SASForMaskedLM(SASConfig(causal=True))
    config = SASConfig(vocab_size=5, n_embd=8, n_layer=1, n_head=1)
    assert SASForMaskedLM(config).config.causal is False and config.causal is None


def test_a_saved_directory_is_verified(tmp_path):
    """verify opens a directory by the class in its config, ours as well as transformers' own."""
    model(dtype=torch.float32).save_pretrained(tmp_path)
    assert gk.verify(tmp_path, tmp_path)["ok"]
