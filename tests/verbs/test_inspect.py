"""inspect counts, measures ranks and entropies and sees the tokens as their definitions say."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DebertaConfig,
    DebertaModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import gaugekit.verbs.inspect
from gaugekit import samples
from gaugekit.reference.nonlocal_energy import nonlocal_energy
from gaugekit.verbs.inspect import SMOOTH, _smoothing
from helpers import minilm
from tiny import add_tokenizer, bert, gpt2

TEXT = ["a cab", "beside the seaside", "quick brown foxes jump"]


@pytest.fixture
def saved(tmp_path):
    gpt2().save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", [bert, gpt2])
def test_counts_follow_from_the_shapes(make):
    model = make()
    report = gaugekit.inspect(model)
    heads, width, layers = 4, 8, 2
    groups = {
        "value_output": heads * width**2,
        "query_key": heads * width**2,
        "key_bias": 32,
        "value_bias": 32,
    }
    groups = {group: layers * dimension for group, dimension in groups.items()}
    assert report["removable"] == sum(groups.values())
    if make is gpt2:  # norms as they are drawn: all gains 1, so that even a tied head lets the stream turn
        groups |= {"norm_gains": 128, "norm_biases": 128, "stream_rotation": 31 * 30 // 2}
        groups["stream_means"] = 48 + layers * (96 + 128 + 32 + 128 + 2)
    total = groups["total"] = sum(groups.values())
    assert {group: size for group, size in report["unobservable"].items() if size} == groups
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,} of {report['parameters']:,} parameters" in report.notes[0]


def test_singular_values_and_ranks_are_those_of_the_product():
    model = bert()
    attention = model.encoder.layer[1].attention.self
    with torch.no_grad():
        left = torch.randn(8, 3) @ torch.randn(3, 32)
        attention.query.weight[8:16] = left  # head 1: three directions only
        attention.key.weight[16:24] = 0  # head 2: nothing at all
    row = gaugekit.inspect(model)["layers"][1]
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        product = attention.query.weight[part].double().T @ attention.key.weight[part].double()
        expected = torch.linalg.svdvals(product)[:8]
        assert row["singular_values"][head] == pytest.approx(expected.tolist(), abs=1e-14)
    assert row["ranks"] == [8, 3, 0, 8]
    assert row["effective_ranks"][2] == 0 and 1 < row["effective_ranks"][1] <= 3.001
    share = torch.tensor(row["singular_values"][0]) / sum(row["singular_values"][0])
    assert row["effective_ranks"][0] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_ranks_are_those_before_rounding_in_every_dtype(make, dtype, tmp_path):
    """Where projections stand alone and where three share one matrix; on disk and live; wide heads keep theirs."""
    sizes = {"hidden_size": 256} if make is bert else {"n_embd": 256}
    model = make(**sizes).double()
    low = (torch.randn(256, 5).double() @ torch.randn(5, 64).double()) / 50
    with torch.no_grad():
        if make is bert:
            model.encoder.layer[0].attention.self.query.weight[64:128] = low.mT
            model.encoder.layer[0].attention.self.key.weight[192:] = 0
        else:
            model.transformer.h[0].attn.c_attn.weight[:, 64:128] = low
            model.transformer.h[0].attn.c_attn.weight[:, 256 + 192 : 512] = 0
    model.to(dtype).save_pretrained(tmp_path)
    for source in (model, tmp_path):
        first, second = gaugekit.inspect(source)["layers"]
        assert first["ranks"] == [64, 5, 64, 0] and second["ranks"] == [64] * 4
        assert first["effective_ranks"][3] == 0 and 4 < first["effective_ranks"][1] < 10
        assert min(second["effective_ranks"]) > 40


def test_exponent_entropy_counts_the_weights_of_a_layer_in_bfloat16():
    model = gpt2()
    with torch.no_grad():
        for parameter in model.transformer.h[0].parameters():
            parameter.fill_(1.0)
            if parameter.dim() > 1:
                parameter[::2] = -4.0
    report = gaugekit.inspect(model)
    assert (
        report["layers"][0]["exponent_entropy_bits"] == 1.0
    )  # 2⁰ and 2² in equal parts; biases and norms not counted
    counts = {}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            for value in parameter.detach().to(torch.bfloat16).flatten().tolist():
                exponent = math.frexp(value)[1] if value else None
                counts[exponent] = counts.get(exponent, 0) + 1
    total = sum(counts.values())
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    assert report["exponent_entropy_bits"] == pytest.approx(entropy, rel=1e-12)


def test_token_cosine_is_the_mean_over_pairs_of_tokens(saved):
    seen = []
    report = gaugekit.inspect(saved, text=TEXT, progress=lambda done, total: seen.append((done, total)))
    model, expected = gpt2().from_pretrained(saved), torch.zeros(3, dtype=torch.float64)
    for text in TEXT:
        ids = torch.tensor([[2 + ord(c) - ord("a") if c != " " else 1 for c in text]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        for index, state in enumerate(states):
            cosine = torch.cosine_similarity(state[0, :, None].double(), state[0, None].double(), dim=-1)
            n = len(cosine)
            expected[index] += (cosine.sum() - n) / (n * n - n) / len(TEXT)
    found = [row["token_cosine"] for row in report["layers"]] + [report["token_cosine"]]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_energy_is_that_of_the_values_of_each_head(saved):
    """With the equation and transformers' own projections, one text at a time; the model stays as it was."""
    live = gpt2().from_pretrained(saved)
    live.set_attn_implementation("eager")
    report = gaugekit.inspect(live, text=TEXT)
    assert live.config._attn_implementation == "eager"
    assert not any("tap" in name for name, _ in live.named_modules())
    for layer, block in enumerate(live.transformer.h):
        seen, found = [], []
        handle = block.attn.c_attn.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        for text in TEXT:
            ids = torch.tensor([[2 + ord(c) - ord("a") if c != " " else 1 for c in text]])
            with torch.no_grad():
                live(ids)
            q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2).double() for x in seen.pop().chunk(3, dim=-1))
            found.append((nonlocal_energy(v, q, k, causal=True) / v.square().sum((2, 3))).mean())
        handle.remove()
        assert report["layers"][layer]["energy"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-5)


def test_a_model_that_over_smooths_is_reported(saved):
    live = gpt2().from_pretrained(saved)
    assert not any("over-smoothing" in note for note in gaugekit.inspect(live, text=TEXT).notes)
    with torch.no_grad():
        live.transformer.h[0].mlp.c_proj.bias.fill_(
            100.0
        )  # one vector, the same for all tokens, outweighs the rest
    notes = gaugekit.inspect(live, text=TEXT).notes
    assert any("over-smoothing: tokens entering layer 1 have a mean cosine of 1.00" in note for note in notes)


def test_over_smoothing_begins_at_a_cosine_of_nine_tenths():
    assert SMOOTH == 0.9
    assert _smoothing([0.2, 0.89, 0.9]) == []
    (note,) = _smoothing([0.2, 0.91, 0.95])
    assert "entering layer 1 have a mean cosine of 0.91" in note
    (note,) = _smoothing([0.2, 0.3, 0.91])
    assert "in the output have a mean cosine of 0.91" in note


def test_a_directory_gives_what_its_live_model_gives(saved):
    live = gpt2().from_pretrained(saved).train()
    directory = gaugekit.inspect(saved, text=TEXT)
    assert gaugekit.inspect(live, text=TEXT).fields == directory.fields == json.loads(directory.json())
    assert all(module.training for module in live.modules())


def test_without_a_tokenizer_there_is_no_token_cosine():
    report = gaugekit.inspect(bert())
    assert report["token_cosine"] is None and report["layers"][0]["token_cosine"] is None
    assert any("no tokenizer" in note for note in report.notes)
    with pytest.raises(ValueError, match="text: expected a tokenizer beside the model"):
        gaugekit.inspect(bert(), text=TEXT)


def test_what_cannot_be_inspected_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a directory with config.json"):
        gaugekit.inspect(tmp_path / "nowhere")
    deberta = DebertaModel(
        DebertaConfig(
            vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    with pytest.raises(ValueError, match="model_type: 'deberta' is not covered: its fused projection"):
        gaugekit.inspect(deberta)


@pytest.mark.parametrize("method", ["gaugekit", "gptq"])
def test_stored_weights_are_not_counted_as_plain_ones(saved, method):
    """From a folder with weights, without them, a file and a dict; but λ of NeuTRENO alone leaves weights plain."""
    plain = json.loads((saved / "config.json").read_text())
    stored = {"quant_method": method, "version": 1, "modules": {"h.0.attn.c_attn": {"form": "linear"}}}
    (saved / "config.json").write_text(json.dumps({**plain, "quantization_config": stored}))
    bare = saved / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((saved / "config.json").read_text())
    for source in (saved, bare, bare / "config.json", {**plain, "quantization_config": stored}):
        with pytest.raises(ValueError, match=f"model: expected plain weights, got ones stored as '{method}'"):
            gaugekit.inspect(source)
    for lam, told in ((0.1, True), ([0.0, 0.2], True), ([0.0, 0.0], False)):
        fused = {"quant_method": "gaugekit", "version": 1, "modules": {}, "neutreno": lam}
        (saved / "config.json").write_text(json.dumps({**plain, "quantization_config": fused}))
        notes = gaugekit.inspect(saved, text=TEXT[:1]).notes
        assert any(note.startswith("counts: of the model without NeuTRENO") for note in notes) is told


@pytest.mark.parametrize("missing", ["wte", "ln_f", "h.0.ln_1", "h.1.mlp.c_fc"])
def test_a_checkpoint_without_its_whole_stream_is_counted_by_its_attention(tmp_path, missing):
    gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = f"transformer.{missing}.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    report = gaugekit.inspect(tmp_path)
    assert report["unobservable"]["total"] == report["removable"] == 2 * (2 * 4 * 8**2 + 2 * 32)
    (note,) = (note for note in report.notes if "not counted" in note)
    assert note.endswith(f"since its stream needs a tensor named {name!r}, and there is none")


def test_a_classifier_s_head_takes_up_the_last_norm(tmp_path):
    """Live, from its directory and from the config alone, where the last norm's gains of a tied model would stay."""
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=90, n_positions=48, num_labels=3, pad_token_id=0
    )
    model = GPT2ForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    reports = [gaugekit.inspect(model), gaugekit.inspect(tmp_path)]
    (tmp_path / "model.safetensors").unlink()
    reports.append(gaugekit.inspect(tmp_path))
    for report in reports:
        assert report["unobservable"]["norm_gains"] == (2 * 2 + 1) * 32
        assert report["unobservable"]["norm_biases"] == 2 * 2 * 32  # this head has no bias
        assert report["unobservable"]["stream_rotation"] == 31 * 30 // 2
        assert not any("table" in note for note in report.notes)


@minilm
def test_the_real_model_has_the_known_redundancy():
    report = gaugekit.inspect(samples.minilm())
    assert report["parameters"] == 22_713_216
    assert {group: size for group, size in report["unobservable"].items() if size} == {
        "value_output": 73_728,
        "query_key": 73_728,
        "key_bias": 2_304,
        "value_bias": 2_304,
        "total": 152_064,
    }
    # Measured before on other sentences of the same text: .065 .137 .165 .202 .255 .349, then .424.
    cosines = [row["token_cosine"] for row in report["layers"]] + [report["token_cosine"]]
    assert cosines == pytest.approx([0.065, 0.137, 0.165, 0.202, 0.255, 0.349, 0.424], abs=0.01)
    assert report["exponent_entropy_bits"] == pytest.approx(2.65, abs=0.02)
    assert all(row["ranks"] == [32] * 12 for row in report["layers"])
    energies = [row["energy"] for row in report["layers"]]
    assert all(0.5 < energy < 1.5 for energy in energies) and not any("smoothing" in n for n in report.notes)


@pytest.mark.parametrize("joined", [False, True])
def test_experts_are_counted_and_carried_along(tmp_path, joined):
    """Two matrices or three an expert in files of their own, and one tensor of three dimensions for all."""
    config = MixtralConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "m", save_original_format=not joined)
    state = load_file(tmp_path / "m" / "model.safetensors")
    assert any(tensor.dim() == 3 for tensor in state.values()) == joined
    count = sum(parameter.numel() for parameter in model.parameters())
    for report in (gaugekit.inspect(tmp_path / "m"), gaugekit.inspect(model)):
        assert report["parameters"] == count
        assert any("MLPs: not counted" in note for note in report.notes)
    done = gaugekit.convert(tmp_path / "m", tmp_path / "out", [gaugekit.symmetry.GaugeFix("balanced")])
    written = load_file(tmp_path / "out" / "model.safetensors")
    experts = [name for name in state if ".experts." in name]
    assert experts and all(torch.equal(written[name], state[name]) for name in experts)
    assert done["parameters_before"] == count and done["parameters_after"] == count - report["removable"]
    gaugekit.codec.pack(tmp_path / "m", tmp_path / "packed")
    gaugekit.codec.unpack(tmp_path / "packed", tmp_path / "back")
    plain, back = (tmp_path / name / "model.safetensors" for name in ("m", "back"))
    assert plain.read_bytes() == back.read_bytes()
