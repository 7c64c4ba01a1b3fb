"""The oracle against numbers worked by hand from the equations of the papers (He and Hofmann eq. 5; NeuTRENO)."""

import math

import torch

from gaugekit.reference.shaped_attention import shaped_attention
from gaugekit.reference.shaped_combine import seen_keys, shaped_combine

V = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64).view(1, 1, 3, 1)
A = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).view(1, 1, 3, 1)


def rows(x):
    return [round(value, 12) for value in x.flatten().tolist()]


def gain(value):
    return torch.tensor([value], dtype=torch.float64)


def test_causal_uniform_attention_is_the_prefix_mean():
    # C V = 1, (1+3)/2, (1+3+8)/3
    assert rows(shaped_combine(A, V, beta=gain(0.0), gamma=gain(-1.0), causal=True)) == [1, 2, 4]


def test_unmasked_uniform_attention_is_the_mean():
    assert rows(shaped_combine(A, V, beta=gain(0.0), gamma=gain(-1.0))) == [4, 4, 4]


def test_every_term():
    # 2·A + 3·V − 5·C V + 7·(V0 − V)
    v0 = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(1, 1, 3, 1)
    out = shaped_combine(
        A, V, alpha=gain(3.0), beta=gain(2.0), gamma=gain(5.0), v0=v0, lam=gain(7.0), causal=True
    )
    assert rows(out) == [20 + 3 - 5 - 7, 40 + 9 - 10 - 14, 60 + 24 - 20 - 42]


def test_window_and_lengths_count_only_seen_keys():
    # window 2: (1)/1, (1+3)/2, (3+8)/2; with two real keys the third row is padding
    out = shaped_combine(A, V, beta=gain(0.0), gamma=gain(-1.0), causal=True, window=2)
    assert rows(out) == [1, 2, 5.5]
    lengths = torch.tensor([2])
    out = shaped_combine(A, V, alpha=gain(1.0), gamma=gain(1.0), causal=True, key_lengths=lengths)
    assert rows(out) == [10 + 1 - 1, 20 + 3 - 2, 0]


def test_query_start_places_the_queries():
    # one query at position 1 of three keys: it sees two of them
    out = shaped_combine(
        A[:, :, :1], V, alpha=gain(1.0), gamma=gain(1.0), causal=True, query_start=torch.tensor([1])
    )
    assert rows(out) == [10 + 3 - 2]
    # without query_start the last query stands at the last key
    assert rows(shaped_combine(A[:, :, :1], V, alpha=gain(1.0), gamma=gain(1.0), causal=True)) == [10 + 8 - 4]


def test_packed_sequences_do_not_see_each_other():
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert rows(shaped_combine(A, V, beta=gain(0.0), gamma=gain(-1.0), causal=True, cu_seqlens=cu)) == [
        1,
        2,
        8,
    ]


def test_seen_keys_of_a_bidirectional_window():
    seen, own = seen_keys(1, 3, 3, window=2)
    assert seen[0].int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert own[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_softmax_core():
    # scores of the second row: 0 and log 3, so the weights are 1/4 and 3/4
    q = torch.tensor([1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    k = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    assert rows(shaped_attention(q, k, v, causal=True)) == [4, 7]
    assert rows(shaped_attention(q, k, v)) == [7, 7]
    # β A + α V − γ C V of the second row: 2·7 + 8 − 6
    ones = gain(1.0)
    assert rows(shaped_attention(q, k, v, alpha=ones, beta=2 * ones, gamma=ones, causal=True)) == [
        8 + 4 - 4,
        16,
    ]


def test_groups_are_read_by_consecutive_heads():
    v = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
    a = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    assert rows(shaped_combine(a, v, alpha=torch.ones(4, dtype=torch.float64))) == [1, 1, 2, 2]


def test_rows_that_see_nothing_are_zero():
    q = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    kv = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    lengths = torch.tensor([0])
    assert rows(shaped_attention(q, kv, kv, gamma=gain(1.0), key_lengths=lengths)) == [0, 0]
    start = torch.tensor([-1])
    assert rows(shaped_attention(q, kv, kv, causal=True, query_start=start)) == [0, 1]
