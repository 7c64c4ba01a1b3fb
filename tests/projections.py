"""Compact projections with random numbers, and what training one has to be."""

import torch


def randomised(module, spread=1.0):
    """``module`` with random parameters, and random rows for each head."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, spread)
    module.rows.copy_(
        torch.stack([torch.randperm(module.inputs)[: module.width] for _ in range(module.heads)])
    )
    return module


def trained_beside_dense(module, put_back, rate):
    """The weight [heads, width, D] of a dense layer after two steps that ``module``, float64, takes with it; after each
    ``put_back`` mends the columns [width, width] that stand for the rows of a head.
    """
    size = module.inputs
    x, target = (torch.randn(9, width, dtype=torch.float64) for width in (size, module.heads * module.width))
    dense = torch.nn.Linear(*reversed(module.weight.shape), bias=False, dtype=torch.float64)
    dense.weight.data.copy_(module.weight.detach())
    heads = dense.weight.data.unflatten(0, (module.heads, -1))
    for layer in (module, dense):
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
            if layer is dense:
                for head, rows in zip(heads, module.rows.long(), strict=True):
                    head[:, rows] = put_back(head[:, rows])
    return heads
