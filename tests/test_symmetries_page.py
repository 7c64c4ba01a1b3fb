"""The page of symmetries is what its generator writes, and its counts are the formulas of each shape."""

import importlib.util
import json
from math import lgamma, log
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import gaugekit as gk
from gaugekit.symmetry import STREAM_SYMMETRIES, SYMMETRIES

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def symmetries():
    spec = importlib.util.spec_from_file_location("symmetries", DOCS / "symmetries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reports(symmetries):
    return symmetries.reports()


def config(name):
    return json.loads((DOCS / "shapes" / f"{name}.json").read_text())


def unobservable(report):
    return {group: size for group, size in report["unobservable"].items() if size and group != "total"}


def test_the_page_is_what_the_generator_writes(symmetries, reports, monkeypatch):
    monkeypatch.setattr(symmetries, "reports", lambda: reports)
    assert (DOCS / "symmetries.md").read_text(encoding="utf-8") == symmetries.page()


def test_every_shape_has_a_title_and_every_group_its_words(symmetries):
    assert set(symmetries.TITLES) == {path.stem for path in (DOCS / "shapes").glob("*.json")}
    text = (DOCS / "symmetries.txt").read_text(encoding="utf-8")
    assert all(f"`{group}`" in text for group in (*SYMMETRIES, *STREAM_SYMMETRIES))


def test_counts_of_decoders_with_layer_norms_are_the_formulas(reports):
    gpt2, opt = config("gpt2"), config("opt-6.7b")
    for name, size, layers, heads, hidden, positions in (
        ("gpt2", gpt2["n_embd"], gpt2["n_layer"], gpt2["n_head"], 4 * gpt2["n_embd"], gpt2["n_positions"]),
        ("opt-6.7b", opt["hidden_size"], opt["num_hidden_layers"], opt["num_attention_heads"], opt["ffn_dim"],
         opt["max_position_embeddings"] + 2),
    ):  # fmt: skip
        counts = {
            "value_output": layers * size * (size // heads),
            "query_key": layers * size * (size // heads),
            "key_bias": layers * size,
            "value_bias": layers * size,
            "norm_gains": 2 * layers * size,
            "norm_biases": 2 * layers * size,
            # both parts read (3 D + M rows) and write (D + M and two biases), and positions are added
            "stream_means": layers * (3 * size + hidden + size + hidden + 2) + positions,
        }
        if name == "opt-6.7b":
            counts["neuron_scales"] = layers * hidden
        assert unobservable(reports[name]) == counts
        bits = layers * (lgamma(heads + 1) + lgamma(hidden + 1)) / log(2)
        assert reports[name]["permutation_bits"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "qwen2.5-7b", "smollm2-135m"])
def test_counts_of_llamas_are_the_formulas(reports, name):
    entries = config(name)
    size, layers = entries["hidden_size"], entries["num_hidden_layers"]
    groups, width = entries["num_key_value_heads"], size // entries["num_attention_heads"]
    tied = entries["tie_word_embeddings"]
    counts = {
        "value_output": layers * groups * width**2,
        "rotary_pairs": layers * groups * width,
        "norm_gains": (2 * layers + (not tied)) * size,
        "neuron_scales": layers * entries["intermediate_size"],
    }
    if not tied:
        counts["stream_rotation"] = size * (size - 1) // 2
    assert unobservable(reports[name]) == counts
    assert reports[name]["removable"] == counts["value_output"]
    assert any("tied" in note or "shares the table" in note for note in reports[name].notes) is tied


def test_counts_of_a_vision_transformer_and_of_two_stacks_are_the_formulas(reports):
    """DeiT-tiny: a class token, 196 patches, 1,000 labels. Whisper-tiny: two streams, keys without a bias, the
    encoder's last norm read by keys and values of four blocks; its basis stays, one behind a GELU, one tied."""
    deit, whisper = config("deit-tiny"), config("whisper-tiny")
    size, layers, hidden = deit["hidden_size"], deit["num_hidden_layers"], deit["intermediate_size"]
    patch = deit["patch_size"] ** 2 * deit["num_channels"] + 1
    width = size // deit["num_attention_heads"]
    assert unobservable(reports["deit-tiny"]) == {
        "value_output": layers * size * width,
        "query_key": layers * size * width,
        "key_bias": layers * size,
        "value_bias": layers * size,
        "norm_gains": (2 * layers + 1) * size,
        "norm_biases": (2 * layers + 1) * size,
        "stream_means": 1
        + 197
        + patch
        + layers * (3 * size + hidden + size + hidden + 2)
        + deit["num_labels"],
        "stream_offsets": 2 * (size - 1),
        "stream_rotation": (size - 1) * (size - 2) // 2,
    }
    size, layers, hidden = whisper["d_model"], whisper["encoder_layers"], whisper["encoder_ffn_dim"]
    positions = whisper["max_source_positions"] + whisper["max_target_positions"]
    # encoder: 3 D + M rows read, D + M and two biases write; decoder: D more of each, a bias, and 2 D read the encoder
    rows = 2 * (3 * size + hidden + size + hidden + 2) + (size + size + 1) + 2 * size
    counts = unobservable(reports["whisper-tiny"])
    assert counts["norm_gains"] == counts["norm_biases"] == (2 * layers + 1 + 3 * layers) * size
    assert counts["stream_means"] == positions + layers * rows
    assert counts.keys() & {"stream_rotation", "stream_offsets", "neuron_scales"} == set()
    notes = reports["whisper-tiny"].notes
    assert any("since a GELU" in note for note in notes) and any("shares the table" in note for note in notes)


def test_counts_that_others_published(reports):
    """GPT-2 as of van Nierop's groups of heads, biases included; Llama-2-7B and Llama-3-8B of V/O and rotary pairs."""
    assert reports["gpt2"]["removable"] == reports["bert-base"]["removable"] == 1_198_080
    # Whisper: four layers of an encoder, four of a decoder with two attentions each; keys have no bias
    assert reports["whisper-tiny"]["removable"] == 12 * (2 * 6 * 64**2 + 384)
    assert reports["llama-2-7b"]["unobservable"]["value_output"] == 16_777_216
    assert reports["llama-2-7b"]["unobservable"]["rotary_pairs"] == 131_072
    assert reports["llama-3-8b"]["unobservable"]["value_output"] == 4_194_304
    assert reports["llama-3-8b"]["unobservable"]["rotary_pairs"] == 32_768
    sizes = {"gpt2": 124_439_808, "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "bert-base": 109_514_298,
             "opt-6.7b": 6_658_473_984, "smollm2-135m": 134_515_008, "deit-tiny": 5_717_416,
             "whisper-tiny": 37_760_640}  # fmt: skip
    assert {name: reports[name]["parameters"] for name in sizes} == sizes
    for name in ("llama-2-7b", "llama-3-8b", "qwen2.5-7b", "smollm2-135m"):
        assert reports[name]["unobservable"]["total"] < 0.004 * reports[name]["parameters"]


def test_a_config_a_file_and_a_folder_say_the_same(tmp_path, reports):
    entries = config("deit-tiny")
    (tmp_path / "config.json").write_text(json.dumps(entries))
    for source in (tmp_path, tmp_path / "config.json", str(DOCS / "shapes" / "deit-tiny.json"), entries):
        assert gk.inspect(source).fields == reports["deit-tiny"].fields
    report = gk.inspect(tmp_path)
    assert report["layers"] == [] and report["exponent_entropy_bits"] is None
    assert "without weights" in report.done and not any("stream" in note for note in report.notes)
    with pytest.raises(ValueError, match="text: expected none beside a config without weights"):
        gk.inspect(tmp_path, text=["a"])


def test_configs_that_are_none_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": "wide"}')
    with pytest.raises(ValueError, match="config.json: n_embd: expected a whole number"):
        gk.inspect(tmp_path)
    with pytest.raises(ValueError, match="model_type: expected one of .* got 'codegen'"):
        gk.inspect({"model_type": "codegen"})
    with pytest.raises(ValueError, match="model_type: expected one of .* got None"):
        gk.inspect({})
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object in other.json"):
        gk.inspect(tmp_path / "other.json")
    with pytest.raises(ValueError, match="has no class Gpt3"):
        gk.inspect({"model_type": "gpt2", "architectures": ["Gpt3"]})
    for weights in ("model.safetensors.index.json", "pytorch_model.bin"):
        (tmp_path / weights).write_bytes(b"")
        with pytest.raises(ValueError, match="checkpoint|config"):
            gk.inspect(tmp_path)
        (tmp_path / weights).unlink()
