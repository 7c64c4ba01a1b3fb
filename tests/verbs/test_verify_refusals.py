"""verify refuses what it cannot compare, and says what was expected."""

import json

import pytest
import torch
from transformers import BertForMaskedLM, T5Config, T5ForConditionalGeneration

import gaugekit.verbs.verify
from tiny import add_tokenizer, bert, copy_of, gpt2


@pytest.fixture
def saved(tmp_path):
    bert().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def refused(message, a, b, **arguments):
    with pytest.raises(ValueError, match=message):
        gaugekit.verify(a, b, **arguments)


def test_arguments():
    a = bert()
    refused("pool: expected None or 'mean', got 'cls'", a, a, pool="cls")
    refused("batch_size: expected a positive integer, got 0", a, a, batch_size=0)
    refused("dtype: expected one of float64, .* got 'int8'", a, a, dtype="int8")
    refused("dtype: expected one of float64, .* got torch.int8", a, a, dtype=torch.int8)
    refused(
        "a: expected a model directory or a live transformers model, got Linear", torch.nn.Linear(2, 2), a
    )
    refused("text: expected a tokenizer beside the model", a, a, text=["A sentence."])


def test_directories(saved, tmp_path):
    live = bert()
    refused(r"b: expected a model directory, got '.*nowhere'", live, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("a: expected a config.json", tmp_path / "empty", live)
    (tmp_path / "empty" / "config.json").write_text((saved / "config.json").read_text())
    refused("a: expected .safetensors files", tmp_path / "empty", live)
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"short")
    refused("model.safetensors: not a .safetensors file", tmp_path / "empty", live)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    refused("has no class NoSuchModel", saved, live)


def test_missing_weights_are_not_filled_with_random_ones(tmp_path):
    bert(BertForMaskedLM).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused("16 weights of BertForMaskedLM are missing: bert.encoder.layer.2", tmp_path / "a", tmp_path / "a")


def test_models_that_do_not_belong_together():
    refused("b: expected the vocabulary of a, 90 tokens, got 91", bert(), bert(vocab_size=91))
    refused(r"b: expected last_hidden_state of shape .* got logits", bert(), bert(BertForMaskedLM))
    refused(
        r"b: expected last_hidden_state of shape .*32\] as from a, got .*16\]", bert(), bert(hidden_size=16)
    )
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=90, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    refused("b: expected a model with a decoder beside its encoder, as a is", t5, gpt2())
    refused("b: expected a model without a decoder beside its encoder, as a is", gpt2(), t5)


def test_layers_of_other_widths_are_left_out_with_a_note():
    a = gpt2()
    b = gpt2(n_layer=3)
    b.load_state_dict(a.state_dict(), strict=False)
    report = gaugekit.verify(a, b)
    assert report["layers"] == [] and any(note.startswith("layers: not compared") for note in report.notes)


def test_a_text_file_must_be_readable_and_hold_sentences(saved, tmp_path):
    add_tokenizer(saved)
    refused(
        "text: expected a UTF-8 text file, got '.*absent.txt'", saved, saved, text=tmp_path / "absent.txt"
    )
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    refused("text: expected a UTF-8 text file", saved, saved, text=tmp_path / "latin.txt")
    (tmp_path / "words.txt").write_text("only words")
    refused("text: expected sentences of 40 to 400 characters", saved, saved, text=tmp_path / "words.txt")
    refused("text: expected text that gives tokens, got none", saved, saved, text=["", ""])


def test_tokenizers_that_read_differently_are_refused(saved, tmp_path):
    copy_of(bert()).save_pretrained(tmp_path / "b")
    add_tokenizer(saved)
    add_tokenizer(tmp_path / "b", letters="zyxwvutsrqponmlkjihgfedcba")
    refused(
        "b: expected a tokenizer that reads the text as a's does", saved, tmp_path / "b", text=["Some text."]
    )
    add_tokenizer(tmp_path / "b")
    assert gaugekit.verify(saved, tmp_path / "b", text=["Some text.", "More of it."])["rows"] == 21
