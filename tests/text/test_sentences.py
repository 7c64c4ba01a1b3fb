"""Sentences follow the written rule."""

import pytest

from gaugekit.text.sentences import LONGEST, SHORTEST, sentences, split


def test_split_follows_each_part_of_the_rule():
    text = (
        "A title over a rule\n===================\n\n"
        "The first sentence runs over\ntwo lines and is joined with one space. The second one ends in"
        " a question, does it? Too short.\n\n"
        "   An indented paragraph is code or a table and is dropped whole.\n\n"
        "* A list mark at the head of a paragraph is taken away from it.\n\n"
        "Abbreviations (e.g. The Times, i.e. Newspapers) do not end a sentence before a capital.\r\n\r\n"
        'She said "that a quoted end counts as an end too." Then the next sentence starts just as usual.\n\n'
        "lower case starts are fragments of something else and are not kept.\n\n"
        "What stops without any mark at its end is not kept either\n\n"
        "* A list mark at the head of a paragraph is taken away from it."
    )
    assert split(text) == [
        "The first sentence runs over two lines and is joined with one space.",
        "The second one ends in a question, does it?",
        "A list mark at the head of a paragraph is taken away from it.",
        "Abbreviations (e.g. The Times, i.e. Newspapers) do not end a sentence before a capital.",
        "Then the next sentence starts just as usual.",
    ]
    assert split("A" * 398 + ".") == ["A" * 398 + "."]
    assert split("A" * 400 + ".") == []


def test_the_default_sentences_are_real_and_distinct():
    default = sentences()
    assert len(default) == len(set(default)) == 500
    assert sentences(20) == default[:20]
    assert all(SHORTEST <= len(s) <= LONGEST and s[0].isupper() and s[-1] in ".!?" for s in default)
    assert all(len(s.split()) >= 5 and "\n" not in s and "  " not in s for s in default)


def test_a_count_out_of_range_is_refused():
    for count in (0, -1, 10**6):
        with pytest.raises(ValueError, match=f"count: expected 1 to .* got {count}"):
            sentences(count)
