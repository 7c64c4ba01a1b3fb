"""A model that caches one tensor generates what it generated with keys and values, whatever way it is asked."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import gaugekit as gk
import gaugekit.integrations.transformers
from gaugekit.hf.cache.layers import GrowingLayer, SingleLayer, StaticSingleLayer
from helpers import assert_accurate
from single_cache_models import CACHE, HOLDS, MAKERS, bart, generate, model, prompts, stored_bytes, whisper

NAMES = list(MAKERS)
TRANSFORMERS = ["gpt2", "opt", "gemma4"]


def pair(name, **options):
    """The same model plain, and fused to cache one tensor."""
    plain = model(name, **options)
    fused = copy.deepcopy(plain)
    report = gk.fuse(fused, cache=HOLDS.get(name, "x"))
    assert report["cached"], report
    return plain, fused


def same(got, expected):
    """The same tokens, and logits to float32's rounding, in which Gemma norms whatever its dtype."""
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_greedy(name, padded):
    plain, fused = pair(name)
    batch = prompts(padded)
    same(generate(fused, *batch), generate(plain, *batch))


@pytest.mark.parametrize("name", NAMES)
def test_beams(name):
    plain, fused = pair(name)
    batch = prompts()
    for length_penalty in (1.0, 2.0):
        beams = [
            m.generate(*batch[:1], attention_mask=batch[1], max_new_tokens=10, do_sample=False, num_beams=3,
                       length_penalty=length_penalty, pad_token_id=0)
            for m in (fused, plain)
        ]  # fmt: skip
        assert torch.equal(*beams)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_static_cache(name, padded):
    plain, fused = pair(name)
    batch = prompts(padded)
    static = {"cache_implementation": "static", "disable_compile": True}
    same(generate(fused, *batch, **static), generate(plain, *batch))
    twice = [
        generate(fused, *batch, **static)[1] for _ in range(2)
    ]  # the second takes the cache of the first
    assert torch.equal(*twice)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_prefill_in_chunks(name, kind):
    plain, fused = pair(name)
    batch = prompts(columns=41)
    options = {"prefill_chunk_size": 5} | ({} if kind == "dynamic" else {"cache_implementation": "static"})
    expected = generate(plain, *batch)
    same(generate(fused, *batch, disable_compile=True, **options), expected)
    options["prefill_chunk_size"] = 20  # more rows at once than are attended to in the cache itself
    same(generate(fused, *batch, disable_compile=True, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_offloaded(name):
    """transformers moves layers by a stream, which a machine without an accelerator lacks."""
    plain, fused = (m.cuda() for m in pair(name))
    batch = [x.cuda() for x in prompts()]
    cache = DynamicCache(config=fused.config, offloading=True)
    same(generate(fused, *batch, **{CACHE: cache}), generate(plain, *batch))
    assert cache.layers[1].keys.device.type == "cpu"


@pytest.mark.parametrize("name", NAMES)
def test_moved_away_and_back_between_steps(name):
    _, fused = pair(name)
    ids, _ = prompts(padded=False)
    cache = DynamicCache(config=fused.config)
    with torch.no_grad():
        expected = fused(ids).logits[:, -2:]
        fused(ids[:, :-2], **{CACHE: cache})
        for column in (0, 1):
            for layer in cache.layers[1::2]:
                layer.offload()
                layer.prefetch()
            out = fused(ids[:, column - 2][:, None], **{CACHE: cache}).logits
            torch.testing.assert_close(out[:, 0], expected[:, column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_drafted_ahead(name):
    """Assisted generation: several tokens at once, and the cache cropped behind those that are refused."""
    plain, fused = pair(name)
    ids, mask = prompts(padded=False)
    ids, mask = ids[:1].repeat(1, 3), mask[:1].repeat(1, 3)
    draft = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    expected = generate(plain, ids, mask, 20)[0]
    assert torch.equal(generate(fused, ids, mask, 20, assistant_model=draft)[0], expected)
    gk.fuse(draft, cache=HOLDS.get(name, "x"))
    assert torch.equal(generate(fused, ids, mask, 20, assistant_model=draft)[0], expected)
    assert torch.equal(generate(fused, ids, mask, 20, prompt_lookup_num_tokens=3)[0], expected)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, DynamicCache) for n in NAMES] + [(n, StaticCache) for n in TRANSFORMERS]
)
def test_columns_with_padding_are_not_taken_back(name, kind):
    """A column that is padding in one sequence is no row of it: another row would go in its place."""
    _, fused = pair(name)
    ids, mask = prompts(padded=False)
    mask[1, -2:] = 0
    cache = kind(config=fused.config, **({"max_cache_len": 40} if kind is StaticCache else {}))
    with torch.no_grad():
        fused(ids, attention_mask=mask, **{CACHE: cache}, **positions(name, mask))
        held = [layer for layer in cache.layers if isinstance(layer, (GrowingLayer, StaticSingleLayer))]
        assert held
        for layer in held:
            layer.crop(0)
            with pytest.raises(ValueError, match="expected at most 0 columns, as many as stand behind"):
                layer.crop(-1)
        if len(held) < len(cache.layers):  # sliding layers of transformers' own are not cropped along
            return
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        answers = []
        for _ in range(2):
            step = {key: value[:, -1:] for key, value in positions(name, mask).items()} | {CACHE: cache}
            answers.append(fused(ids[:, :1], attention_mask=mask, **step).logits)
            for layer in held:
                layer.crop(-1)
        assert torch.equal(*answers)


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_cache(name):
    """A second turn, padded itself; and one prefix for several continuations."""
    plain, fused = pair(name)
    padded = name != "gemma4"  # whose sliding windows take padding at one end only
    (ids, mask), (more, more_mask) = prompts(padded), prompts(padded, columns=5)
    both = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    cache = DynamicCache(config=fused.config)
    with torch.no_grad():
        fused(ids, attention_mask=mask, **{CACHE: cache}, **positions(name, mask))
        twin = copy.deepcopy(cache)
        same(generate(fused, *both, **{CACHE: cache}), generate(plain, *both))
        other = both[0].clone()
        other[:, -1] = 7
        other_mask = both[1].clone()
        same(generate(fused, other, other_mask, **{CACHE: twin}), generate(plain, other, other_mask))


def positions(name, mask):
    """As ``generate`` counts them."""
    return {} if name == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_cache_are_half(name):
    plain, fused = pair(name)
    ids, mask = prompts(padded=False)
    sizes = []
    for m in (plain, fused):
        cache = DynamicCache(config=m.config)
        m(ids, attention_mask=mask, **{CACHE: cache})
        layers = cache.layers[1::2] if name == "gemma4" else cache.layers
        cache.layers = layers
        sizes.append(stored_bytes(cache))
    assert sizes[0] == 2 * sizes[1]
    report = gk.fuse(copy.deepcopy(plain), cache=HOLDS.get(name, "x"))
    told = [sum(layer[key] for layer in report["cached"]) for key in ("bytes_before", "bytes_after")]
    assert told == [size / ids.numel() for size in sizes]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_static_buffers_are_half_and_stay_in_place(name):
    _, fused = pair(name)
    ids, mask = prompts(padded=False)
    cache = StaticCache(config=fused.config, max_cache_len=32)
    fused(ids, attention_mask=mask, **{CACHE: cache})
    layer = cache.layers[1]
    assert type(layer) is StaticSingleLayer
    assert layer.keys.shape[2] == 32 and layer.values.numel() == 0
    address = layer.keys.data_ptr()
    fused(ids[:, :1], **{CACHE: cache})
    assert layer.keys.data_ptr() == address and int(layer.get_seq_length()) == 10
    cache.reset()
    assert int(layer.get_seq_length()) == 0 and not layer.keys.any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_off_by_its_own_noise(name):
    plain, fused = pair(name, dtype=torch.float32)
    ids, mask = prompts(padded=name != "gemma4")
    ids, mask = ids.repeat(1, 5), mask.repeat(1, 5)  # padding inside, too, but where windows slide
    exact, rounded = copy.deepcopy(plain).double(), copy.deepcopy(plain).bfloat16()
    half = fused.bfloat16()
    answers = []
    with torch.no_grad():
        for m in (half, exact, rounded):
            cache, parts = DynamicCache(config=m.config), []
            for begin, end in ((0, 40), (40, 43), (43, 44), (44, 45)):
                out = m(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache})
                parts.append(out.logits[mask[:, begin:end].bool()])
            answers.append(torch.cat(parts))
    assert_accurate(*answers)


@pytest.mark.parametrize("maker", [bart, whisper])
def test_decoders_of_encoder_decoders(maker):
    plain = model("it", torch.float32, {"it": maker})
    fused = copy.deepcopy(plain)
    report = gk.fuse(fused, cache="x")
    assert [layer["module"] for layer in report["cached"]] == [
        f"model.decoder.layers.{i}.self_attn" for i in (0, 1)
    ]
    ids = prompts()[0] if maker is bart else torch.randn(2, 8, 100)
    for beams in (1, 2):
        options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_copy_and_a_pickled_model_stand_by_themselves(name):
    plain, fused = pair(name)
    batch = prompts()
    expected = generate(plain, *batch)
    others = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    gk.unfuse(fused)
    for other in others:
        same(generate(other, *batch), expected)
        gk.unfuse(other)
        assert not any("forward" in module.__dict__ for module in other.modules())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_training_with_a_cache_learns_the_same(name):
    """transformers hands a cache to a model in training, too, unless it is told not to."""
    changes = {
        "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.3, "embd_pdrop": 0.0},
        "opt": {"attention_dropout": 0.0, "dropout": 0.0, "layerdrop": 0.0},
    }.get(name, {})
    gradients = []
    for m in pair(name, **changes):
        torch.manual_seed(3)
        m.train()(*prompts()[:1], labels=prompts()[0], use_cache=True).loss.backward()
        gradients.append([parameter.grad for parameter in m.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_refused_in_training():
    _, fused = pair("gpt2")
    fused.train()
    with pytest.raises(ValueError, match="dropout: expected 0"):
        fused(prompts()[0], use_cache=True)


@pytest.mark.parametrize("name", ["gpt2", "gemma4"])
def test_a_compiled_step(name):
    plain, fused = pair(name, dtype=torch.float32, num_hidden_layers=1, layer_types=["full_attention"])
    ids, mask = prompts()
    mask = torch.cat([mask, mask.new_ones(3, 2)], 1)
    answers = []
    for m, backend in ((plain, None), (fused, "aot_eager")):
        cache = StaticCache(config=m.config, max_cache_len=16)
        with torch.no_grad():
            m(ids, attention_mask=mask[:, :9], **{CACHE: cache})
            run = torch.compile(m, fullgraph=True, backend=backend) if backend else m
            for step in range(2):
                seen = mask[:, : 10 + step]
                answers.append(run(ids[:, step : step + 1], attention_mask=seen, **{CACHE: cache}).logits)
    for a, b in zip(answers[:2], answers[2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_512_greedy_tokens_in_float32(name):
    plain, fused = pair(name, dtype=torch.float32, **({} if name == "gemma4" else {"num_hidden_layers": 1}))
    ids, mask = prompts()
    options = {"max_new_tokens": 512, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got, expected = (m.generate(ids[:2], attention_mask=mask[:2], **options) for m in (fused, plain))
    assert got.shape == (2, 521) and torch.equal(got, expected)


@torch.no_grad()
def test_keys_and_values_are_there_for_an_assistant_that_asks():
    """Gemma 4's assistants read those of the last layer of each kind."""
    (ids, _), shared = prompts(padded=False), []
    for m in pair("gemma4"):
        cache = DynamicCache(config=m.config)
        for part in (ids[:, :7], ids[:, 7:]):
            out = m.model(part, return_shared_kv_states=True, **{CACHE: cache})
            shared.append(out.shared_kv_states["full_attention"])
    for got, expected in zip(shared[2:], shared[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_single_layers_take_the_place_of_empty_ones_only():
    _, fused = pair("gemma4")
    cache = DynamicCache(config=fused.config)
    fused(prompts()[0], **{CACHE: cache})
    assert [type(layer) is SingleLayer for layer in cache.layers] == [False, True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_going_on_outside_of_inference_mode(name):
    _, fused = pair(name)
    ids, _ = prompts(padded=False)
    cache = DynamicCache(config=fused.config)
    with torch.inference_mode():
        expected = fused(ids).logits[:, -1]
        fused(ids[:, :-2], **{CACHE: cache})
        fused(ids[:, -2:-1], **{CACHE: cache})  # into a buffer with room for the next
    with torch.no_grad():
        out = fused(ids[:, -1:], **{CACHE: cache}).logits[:, -1]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
