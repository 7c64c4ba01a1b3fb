"""The README's table of families is what the adapters say, and every family is in it."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gaugekit.models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", ROOT / "docs" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_holds_the_table_as_it_is_now(families):
    assert families.BEGIN + families.table() + families.END in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_every_family_has_a_title(families):
    assert set(families.TITLES) == set(FAMILIES)


def test_rows_by_hand(families):
    """BERT has all four groups; Llama turns queries and keys by position, StableLM some channels; what MPNet adds to
    its scores bars nothing, what DeBERTa multiplies by bars the key bias; T5 has no biases, Whisper none of keys.
    Whose stream can be sliced is a decoder with a norm before each part, and one part after the other but in Phi."""
    assert families.row("bert") == ("everything", "yes", "–", "yes")
    assert families.row("llama") == ("values and output, value bias", "in whole rotary pairs", "yes", "yes")
    assert families.row("stablelm") == ("values and output", "yes", "–", "–")
    assert families.row("mpnet") == ("everything", "yes", "–", "–")
    assert families.row("deberta-v2") == ("values and output, queries and keys, value bias", "–", "–", "–")
    assert families.row("t5") == ("values and output, queries and keys", "yes", "–", "–")
    assert families.row("whisper") == ("values and output, queries and keys, value bias", "yes", "–", "–")
    assert families.row("opt") == ("everything", "yes", "yes", "–")
    assert families.row("phi") == ("values and output, value bias", "yes", "yes", "–")
