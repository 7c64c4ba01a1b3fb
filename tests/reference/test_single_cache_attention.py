"""The oracle of single_cache_attention against numbers worked by hand."""

import math

import torch

from gaugekit.reference.single_cache_attention import rotated, rows_of_pages, single_cache_attention


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def test_slices_and_whole_rows():
    """Two rows, scores ln 3 and 0: weights 3/4 and 1/4. The second head reads the second half of the row."""
    cache = double([[[[4.0, 8.0], [0.0, 4.0]]]])
    q = double([[[[math.log(3) / 4, 0.0]], [[0.0, math.log(3) / 4]]]])
    whole = single_cache_attention(q, cache, scale=1.0)
    torch.testing.assert_close(whole, double([[[[3.0, 7.0]], [[3.0, 7.0]]]]))
    slices = single_cache_attention(q, cache, scale=1.0, slices=True)
    torch.testing.assert_close(slices, double([[[[3.0]], [[7.0]]]]))


def test_terms():
    """2·softmax + 3·own row − 4·mean over the two rows seen of three; the query is the last of them."""
    cache, q = double([[[[4.0], [0.0], [100.0]]]]), double([[[[math.log(3) / 4]]]])
    gains = {"alpha": double([3.0]), "beta": double([2.0]), "gamma": double([4.0])}
    out = single_cache_attention(q, cache, scale=1.0, key_lengths=torch.tensor([2]), **gains)
    torch.testing.assert_close(out, double([[[[2 * 3.0 + 3 * 0.0 - 4 * 2.0]]]]))


def test_keys_are_turned_values_are_not():
    """C = 4 with one pair turned by 90°, (1, 3) to (−3, 1), channels 0 and 2; the gain comes before the turn."""
    rows = double([[[[1.0, 5.0, 3.0, 7.0]]]])
    assert rotated(rows, double([[0.0]]), double([[1.0]])).tolist() == [[[[-3.0, 5.0, 1.0, 7.0]]]]
    cache = torch.cat([rows, torch.zeros_like(rows)], 2)
    q, gain = double([[[[0.0, 0.0, 1.0, 0.0]]]]), double([math.log(3), 1.0, 1.0, 1.0])
    turn = {"cos": double([[0.0], [1.0]]), "sin": double([[1.0], [0.0]]), "key_gain": gain}
    out = single_cache_attention(q, cache, scale=1.0, **turn)
    torch.testing.assert_close(out, 0.75 * rows)


def test_pages():
    cache = torch.arange(6.0).view(3, 1, 2, 1)  # pages (0, 1), (2, 3), (4, 5)
    rows = rows_of_pages(cache, torch.tensor([[2, 0], [1, 1]], dtype=torch.int32))
    assert rows.flatten(1).tolist() == [[4, 5, 0, 1], [2, 3, 2, 3]]
