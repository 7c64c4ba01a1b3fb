"""Law 6: inside a group the output does not move, outside it does, and gradients are orthogonal to the orbits."""

from dataclasses import replace

import pytest
import torch

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry import REMOVED, SYMMETRIES

EPS = torch.finfo(torch.float64).eps


def random_view(heads=4, groups=2, inputs=12, width=3, values=5, biases=True, causal=True, rotary=0):
    def projection(count, rows, columns, bias):
        return Projection(
            torch.randn(count, rows, columns, dtype=torch.float64),
            torch.randn(bias, dtype=torch.float64) if biases else None,
        )

    return AttentionView(
        projection(heads, inputs, width, (heads, width)),
        projection(groups, inputs, width, (groups, width)),
        projection(groups, inputs, values, (groups, values)),
        projection(heads, values, inputs, (inputs,)),
        scale=width**-0.5,
        causal=causal,
        rotary=rotary,
    )


def difference(view, other):
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    expected = view.attend(x)
    return ((other.attend(x) - expected).norm() / expected.norm()).item()


NOISE = 1e3 * EPS  # a few hundred additions deep, elements of condition ≤ 4
CASES = [
    {},
    {"biases": False},
    {"causal": False, "groups": 4},
    {"groups": 1, "values": 2},
]


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("case", CASES)
def test_a_random_element_leaves_the_output_unchanged(name, case):
    symmetry, view = SYMMETRIES[name], random_view(**case)
    if symmetry.dimension(view) == 0:
        with pytest.raises(ValueError, match="no such freedom"):
            symmetry.act(view, symmetry.random(view))
        return
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(1)))
    assert difference(view, moved) < NOISE
    assert symmetry.contains(view, moved)
    part = {"value_output": "v", "query_key": "q", "key_bias": "k", "value_bias": "v"}[name]
    assert not torch.equal(
        *(
            torch.cat([getattr(one, part).weight.flatten(), getattr(one, part).bias.flatten()])
            for one in (view, moved)
        )
        if case.get("biases", True)
        else (getattr(view, part).weight, getattr(moved, part).weight)
    )


def outside(name, view):
    """The same motion on one side only: not a symmetry."""
    symmetry = SYMMETRIES[name]
    moved = symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(1)))
    kept = {"value_output": {"o": view.o}, "query_key": {"k": view.k}, "value_bias": {"o": view.o}}
    if (
        name == "key_bias"
    ):  # not one number a key head but one a key: the weight of the bias changes with the token
        return replace(view, k=Projection(view.k.weight + moved.k.bias[:, None], view.k.bias))
    return replace(moved, **kept[name])


@pytest.mark.parametrize("name", REMOVED)
def test_an_element_outside_changes_the_output(name):
    view = random_view()
    other = outside(name, view)
    assert difference(view, other) > 1e-3
    assert not SYMMETRIES[name].contains(view, other)


@pytest.mark.parametrize("name", REMOVED)
def test_membership_is_no_wider_than_the_group(name):
    view = random_view()
    for other in (SYMMETRIES[group] for group in REMOVED):
        moved = other.act(view, other.random(view))
        assert SYMMETRIES[name].contains(view, moved) == (other.name == name), other.name


@pytest.mark.parametrize("name", REMOVED)
def test_the_gradient_of_a_loss_is_orthogonal_to_the_orbit(name):
    symmetry, view = SYMMETRIES[name], random_view()
    x, target = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    direction = symmetry.random(view)
    identity = torch.zeros_like(direction)
    if not name.endswith("bias"):
        identity.diagonal(dim1=1, dim2=2).fill_(1)

    def parts(one):
        return [t for part in (one.q, one.k, one.v, one.o) for t in (part.weight, part.bias)]

    def path(step):
        return tuple(parts(symmetry.act(view, identity + step * direction)))

    _, tangent = torch.func.jvp(
        path, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),)
    )
    leaves = [t.clone().requires_grad_() for t in parts(view)]
    q, k, v, o = (Projection(*leaves[i : i + 2]) for i in range(0, 8, 2))
    loss = (replace(view, q=q, k=k, v=v, o=o).attend(x) - target).square().sum()
    gradient = torch.autograd.grad(loss, leaves)
    product = sum((g * t).sum() for g, t in zip(gradient, tangent, strict=True))
    lengths = [sum(t.square().sum() for t in ts).sqrt() for ts in (gradient, tangent)]
    assert min(lengths) > 1e-3
    assert product.abs() < NOISE * lengths[0] * lengths[1]


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("case", CASES)
def test_fix_stays_on_the_orbit(name, case):
    symmetry, view = SYMMETRIES[name], random_view(**case)
    if case.get("groups") == 1 and name == "query_key":
        assert symmetry.dimension(view) == 9
    fixed = symmetry.fix(view)
    assert difference(view, fixed) < NOISE
    if symmetry.dimension(view) == 0:
        assert fixed == view
    elif name == "key_bias":
        assert fixed.k.bias is None and symmetry.dimension(fixed) == 0
    elif name == "value_bias":
        assert fixed.v.bias is None and symmetry.contains(view, fixed)
    else:
        part = fixed.v if name == "value_output" else fixed.k
        taken = part.weight.gather(1, part.rows[..., None].expand(-1, -1, part.weight.shape[2]))
        assert torch.equal(taken, torch.eye(part.weight.shape[2], dtype=torch.float64).expand_as(taken))
        assert symmetry.contains(view, fixed)


@pytest.mark.parametrize("how", ["max_volume", "shared_partition"])
@pytest.mark.parametrize("name", ["value_output", "query_key"])
def test_fix_does_not_depend_on_where_on_the_orbit_it_starts(name, how):
    """A canonical form: moving along the orbit first gives the same fixed weights.

    Each head has rows 10⁴ times as large as the others, so that no second choice is of locally maximal volume; the
    order in which they are taken is left open, and permutes the channels.
    """
    symmetry, fixed, takes_up = SYMMETRIES[name], *(("v", "o") if name == "value_output" else ("k", "q"))
    view = random_view(heads=4, groups=4, values=3)
    large = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(4, 3)
    weight = getattr(view, fixed).weight * 1e-4
    block = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(4, 3, 3, dtype=torch.float64)
    weight.scatter_(1, large[..., None].expand(4, 3, 3), block)
    view = replace(view, **{fixed: Projection(weight, getattr(view, fixed).bias)})
    points = []
    for start in (view, symmetry.act(view, symmetry.random(view))):
        point = symmetry.fix(start, how)
        rows, order = getattr(point, fixed).rows.sort(dim=1)
        assert torch.equal(rows, large.sort(dim=1).values)
        channels = order[:, None].expand(-1, 12, -1)
        other = getattr(point, takes_up).weight
        other = (
            other if other.shape[2] == 3 else other.mT
        )  # what multiplies the channels: W_Q, or W_O transposed
        points.append((getattr(point, fixed).weight.gather(2, channels), other.gather(2, channels)))
    assert getattr(view, fixed).weight.sub(getattr(start, fixed).weight).abs().max() > 0.1
    for a, b in zip(*points, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rotary_positions_take_the_query_key_freedom_away():
    view = random_view(rotary=2)
    for name in ("query_key", "key_bias"):
        assert SYMMETRIES[name].dimension(view) == 0
        assert SYMMETRIES[name].fix(view) == view
        with pytest.raises(ValueError, match="rotary"):
            SYMMETRIES[name].act(
                view, SYMMETRIES[name].random(view) if name == "query_key" else torch.zeros(2, 3)
            )
    assert SYMMETRIES["value_output"].dimension(view) == 2 * 25


def test_an_element_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(2, 5, 5\), got \(2, 3, 3\)"):
        SYMMETRIES["value_output"].act(random_view(), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_heads_of_lower_rank_are_fixed_too():
    """A dead direction in a head leaves no invertible block; C M = W still, and the function stays."""
    view = random_view(biases=False)
    low = torch.randn(2, 12, 2, dtype=torch.float64) @ torch.randn(2, 2, 5, dtype=torch.float64)
    dead = replace(view, v=Projection(low), k=Projection(torch.zeros(2, 12, 3, dtype=torch.float64)))
    for name in ("value_output", "query_key"):
        fixed = SYMMETRIES[name].fix(dead)
        assert difference(dead, fixed) < NOISE
    biased = replace(dead, v=Projection(low, torch.randn(2, 5, dtype=torch.float64)))
    with pytest.raises(ValueError, match="fix the bias group first"):
        SYMMETRIES["value_output"].fix(biased)
