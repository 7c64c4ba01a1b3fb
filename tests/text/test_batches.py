"""Text as token ids, batches and pooled vectors: cut, padded and averaged as it says."""

import pytest
import torch

from gaugekit.text.batches import batches, padding, token_ids
from gaugekit.text.pooling import embeddings


def letters(text, truncation, max_length, padding):
    return {"input_ids": [[ord(letter) for letter in string[:max_length]] for string in text]}


def test_ids_are_cut_to_the_longest_and_to_so_many_in_all():
    assert token_ids(letters, ["abcd", "", "e"], 3) == [[97, 98, 99], [101]]
    assert token_ids(letters, ["abc", "de", "f"], 9, most=4) == [[97, 98, 99], [100]]
    assert token_ids(letters, ["abc", "de", "f"], 9, most=3) == [[97, 98, 99]]
    with pytest.raises(ValueError, match="text_file: expected text that gives tokens, got none"):
        token_ids(letters, [""], 3, argument="text_file")


def test_batches_go_by_length_and_pad_on_the_right():
    (ids, mask), (last, whole) = batches([[1, 2, 3], [4], [5, 6]], 2, pad=9)
    assert ids.tolist() == [[4, 9], [5, 6]] and mask.tolist() == [[1, 0], [1, 1]]
    assert last.tolist() == [[1, 2, 3]] and whole.tolist() == [[1, 1, 1]]
    assert [len(ids) for ids, _ in batches([[1, 2, 3], [4], [5, 6]], 3, tokens=4)] == [2, 1]


def test_a_config_without_a_padding_id_pads_with_zero():
    class Config:
        pad_token_id = None

    assert padding(object()) == padding(Config) == 0
    Config.pad_token_id = 7
    assert padding(Config) == 7


def test_the_mean_is_over_real_tokens_whatever_stands_at_the_others():
    states = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [torch.nan, 9.0]], [[6.0, 8.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    means = embeddings(states, mask)
    assert means.dtype == torch.float64
    torch.testing.assert_close(means, torch.tensor([[0.6, 0.8], [0.6, 0.8]], dtype=torch.float64))
    torch.testing.assert_close(embeddings(states[1:]), means[1:])
