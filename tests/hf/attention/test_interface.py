"""The attention function "gaugekit" gives what transformers' own give, with every padding, cache and window.

The float64 oracle is transformers' "sdpa": its "eager" takes the softmax in float32 whatever the dtype. Positions of
padding hold no output and are not compared.
"""

import pytest
import torch
import torch._dynamo.testing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
)

from gaugekit.hf.attention import interface
from helpers import assert_accurate
from tiny import bert, gpt2

T = 12
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)


@pytest.fixture(autouse=True)
def registered():
    interface.register()


def wide(model):
    """Weights ten times the usual start, so that attention is peaked and tokens differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def llama(**changes):
    return wide(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **changes)))


def mistral(**changes):
    return wide(MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **changes)))


PADDING = {
    "none": torch.ones(3, T, dtype=torch.int64),
    "right": torch.tensor([[1] * n + [0] * (T - n) for n in (T, 7, 1)]),
    "left": torch.tensor([[0] * (T - n) + [1] * n for n in (T, 7, 1)]),
    "holes": torch.tensor([[1, 0] * 6, [0, 1, 1] * 4, [0] * 5 + [1] * 3 + [0] * 4]),
    "inner": torch.tensor([[0, 1] * 6, [1, 0, 1] * 4, [1] * 3 + [0] * 4 + [1] * 5]),
}


def output(model, name, **inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_one_forward(make, padding, dtype):
    model, mask = make(), PADDING[padding]
    inputs = dict(input_ids=torch.randint(1, 90, (3, T)), attention_mask=mask)
    if make is not bert:
        inputs["position_ids"] = positions(mask)
    model.to(dtype)
    ours, naive = (output(model, name, **inputs) for name in ("gaugekit", "eager"))
    reference = output(model.double(), "sdpa", **inputs)
    assert_accurate(ours[mask.bool()], reference[mask.bool()], naive[mask.bool()])


def test_no_mask_at_all_keeps_causality():
    model, ids = gpt2(), torch.randint(1, 90, (2, T))
    whole = output(model, "gaugekit", input_ids=ids)
    assert torch.equal(whole[:, :5].argmax(-1), output(model, "gaugekit", input_ids=ids[:, :5]).argmax(-1))
    torch.testing.assert_close(whole, output(model, "sdpa", input_ids=ids))


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "inner"])  # the first new token follows a real one
@pytest.mark.parametrize("make", [lambda: wide(gpt2()), llama], ids=["gpt2", "llama"])
def test_generate_gives_the_same_tokens(make, padding, arguments):
    model, ids = make(), torch.randint(1, 90, (3, T))
    inputs = dict(
        attention_mask=PADDING[padding], max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    tokens = []
    for name in ("eager", "gaugekit"):
        model.set_attn_implementation(name)
        tokens.append(model.generate(ids, **inputs, **arguments))
    assert torch.equal(*tokens)
    assert len(tokens[0][:, T:].unique()) > 5


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_prefill_in_chunks_is_one_forward(make, padding):
    model, mask, ids = make().double(), PADDING[padding], torch.randint(1, 90, (3, T))
    whole = output(model, "gaugekit", input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    cache, parts = None, []
    for start, stop in ((0, 5), (5, 6), (6, T)):
        with torch.no_grad():
            part = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions(mask)[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = part.past_key_values
        parts.append(part.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_sliding_window(padding):
    model, mask = mistral(sliding_window=4).double(), PADDING[padding]
    inputs = dict(input_ids=torch.randint(1, 90, (3, T)), attention_mask=mask)
    ours, theirs = (output(model, name, **inputs) for name in ("gaugekit", "sdpa"))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
    model.config.sliding_window = None
    assert not torch.allclose(output(model, "sdpa", **inputs)[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate_past_a_sliding_window(padding):
    model, ids = mistral(sliding_window=4), torch.randint(1, 90, (3, T))
    tokens = []
    for name in ("eager", "gaugekit"):
        model.set_attn_implementation(name)
        tokens.append(
            model.generate(ids, attention_mask=PADDING[padding], max_new_tokens=10, do_sample=False)
        )
    assert torch.equal(*tokens)


def test_bidirectional_sliding_window():
    config = ModernBertConfig(
        **SIZES, local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1
    )
    config.update({"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2})
    model, mask = wide(ModernBertModel(config)).double(), PADDING["right"]
    inputs = dict(input_ids=torch.randint(3, 90, (3, T)), attention_mask=mask)
    ours, theirs = (output(model, name, **inputs) for name in ("gaugekit", "sdpa"))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])


PLACES = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6], [*range(12)], [0, 1, 2] * 4])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [llama, lambda **changes: mistral(sliding_window=3, **changes)])
def test_packed_sequences_do_not_see_each_other(make, rows):
    model, ids, places = make(use_cache=False).double(), torch.randint(1, 90, (rows, T)), PLACES[:rows]
    ours, theirs = (output(model, name, input_ids=ids, position_ids=places) for name in ("gaugekit", "sdpa"))
    torch.testing.assert_close(ours, theirs)
    alone = output(model, "gaugekit", input_ids=ids[:1, 5:])
    torch.testing.assert_close(ours[:1, 5:], alone)


@pytest.mark.parametrize(
    "make, dtype, low",
    [
        (llama, torch.float32, torch.bfloat16),
        (llama, torch.bfloat16, torch.float16),  # torch's own LayerNorm, which the others have, refuses this
        (gpt2, torch.float32, torch.bfloat16),
        (bert, torch.float32, torch.bfloat16),
    ],
)
def test_autocast_is_that_of_sdpa(make, dtype, low):
    """Rotary angles leave queries and keys in float32 beside values in the lower dtype."""
    model, ids = make().to(dtype), torch.randint(1, 90, (3, T))
    outputs, gradients = {}, {}
    for name in ("gaugekit", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", low):
            out = model(ids)[0]
        out.float().square().mean().backward()
        outputs[name], gradients[name] = out, model.get_input_embeddings().weight.grad
    assert outputs["gaugekit"].dtype == outputs["sdpa"].dtype
    model.double()
    reference = output(model, "sdpa", input_ids=ids)
    assert_accurate(outputs["gaugekit"], reference, outputs["sdpa"], ulps=64)
    assert gradients["gaugekit"].isfinite().all() and gradients["gaugekit"].any()


def test_an_encoder_as_decoder_with_cross_attention():
    config = BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    model, mask = wide(BertModel(config)).double(), PADDING["left"]
    inputs = dict(
        input_ids=torch.randint(1, 90, (3, 5)),
        encoder_hidden_states=torch.randn(3, T, 32, dtype=torch.float64),
        encoder_attention_mask=mask,
    )
    torch.testing.assert_close(*(output(model, name, **inputs) for name in ("gaugekit", "sdpa")))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_gradients_are_those_of_sdpa(padding):
    model, mask = gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).double().train(), PADDING[padding]
    ids, gradients = torch.randint(1, 90, (3, T)), []
    for name in ("sdpa", "gaugekit"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        logits[mask.bool()].square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients)


def compiled(model, **inputs):
    """Whole, by a backend that runs what was traced; one frame."""
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=frames, fullgraph=True)(**inputs)[0]
    assert frames.frame_count == 1
    return out


def windowed():
    return mistral(sliding_window=4, use_cache=False)


@pytest.mark.parametrize(
    "make, padding",
    [
        (gpt2, "left"),
        (lambda: gpt2(n_layer=1), "holes"),
        (lambda: bert(num_hidden_layers=1), "right"),
        (windowed, "left"),
        (windowed, "none"),
    ],
)  # of two layers where the second reads what the first left of the mask: once a family is enough
def test_compiled_whole(make, padding):
    model, ids, mask = make(), torch.randint(1, 90, (3, T)), PADDING[padding]
    inputs = dict(input_ids=ids, attention_mask=mask)
    eager = output(model, "gaugekit", **inputs)
    torch.testing.assert_close(compiled(model, **inputs)[mask.bool()], eager[mask.bool()])


@pytest.mark.parametrize("make", [lambda: llama(use_cache=False), windowed], ids=["whole", "window"])
def test_packed_rows_compile_whole(make):
    """So do training calls: without a mask and a cache, a traced call cannot tell whether anything is packed."""
    model, ids = make(), torch.randint(1, 90, (3, T))
    expected = output(model, "sdpa", input_ids=ids, position_ids=PLACES)
    model.set_attn_implementation("gaugekit")
    torch.testing.assert_close(compiled(model, input_ids=ids, position_ids=PLACES), expected)


def test_a_window_over_holes_stops_the_compiled_model():
    model = windowed()
    model.set_attn_implementation("gaugekit")
    with pytest.raises(RuntimeError, match="padding at one end only"):
        compiled(model, input_ids=torch.randint(1, 90, (3, T)), attention_mask=PADDING["holes"])


def test_export_with_any_length():
    model, ids = windowed(), torch.randint(1, 90, (2, T))
    model.set_attn_implementation("gaugekit")
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(
        model, (ids[:, :9].contiguous(),), dynamic_shapes={"input_ids": {1: length}}
    )
    torch.testing.assert_close(program.module()(ids).logits, output(model, "sdpa", input_ids=ids))
