"""The reference of gauge_linear against numbers worked by hand."""

import torch

from gaugekit.reference.gauge_linear import gauge_linear


def test_two_heads_by_hand():
    """D = 3, heads of width 1: head 0 passes input 2 and takes (x0, x1)·(1, 10); head 1 passes 0, (x1, x2)·(2, −1)."""
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    free = torch.tensor([[[1.0], [10.0]], [[2.0], [-1.0]]])
    rows = torch.tensor([[2], [0]], dtype=torch.int32)
    assert gauge_linear(x, free, rows).tolist() == [[3 + 1 + 20, 1 + 4 - 3], [-1 + 0 + 10, 0 + 2 + 1]]
    biased = gauge_linear(x, free, rows, torch.tensor([100.0, 200.0]))
    assert biased.tolist() == [[124, 202], [109, 203]]


def test_a_plain_projection_comes_first():
    """Queries x·(1, 1, 1) + 5, then one head of width 2: inputs 1 and 0, in this order, and 7 x2 added to both."""
    x = torch.tensor([[1.0, 2.0, 3.0]])
    free, rows = torch.tensor([[[7.0, 7.0]]]), torch.tensor([[1, 0]], dtype=torch.int32)
    weight, weight_bias = torch.ones(1, 3), torch.tensor([5.0])
    assert gauge_linear(x, free, rows, None, weight, weight_bias).tolist() == [[11, 23, 22]]


def test_width_equal_to_the_inputs_is_a_permutation():
    x, rows = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    assert gauge_linear(x, torch.empty(1, 0, 3), rows).tolist() == [[3, 1, 2]]
