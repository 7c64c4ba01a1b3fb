"""What rotary positions and norms leave between queries and keys: groups act, nothing outside does, none is missing."""

from dataclasses import replace

import pytest
import torch

from gaugekit.models import AttentionView, Norms, Projection
from gaugekit.symmetry import SYMMETRIES, count

EPS = torch.finfo(torch.float64).eps
NOISE = 1e4 * EPS
INPUTS, WIDTH = 5, 4
# name: (what the view has, the dimensions of the groups for one key/value head of two queries')
CASES = {
    "rotary": (dict(rotary=4), {"rotary_pairs": 4}),
    "interleaved": (dict(rotary=4, interleaved=True), {"rotary_pairs": 4}),
    "partial": (dict(rotary=2), {"rotary_pairs": 2, "plain_query_key": 4, "plain_key_bias": 2}),
    "partial, interleaved": (
        dict(rotary=2, interleaved=True), {"rotary_pairs": 2, "plain_query_key": 4, "plain_key_bias": 2}
    ),
    "shared gains": (dict(rotary=4, gains="shared"), {"query_key_gains": 2}),
    "shared gains, offset": (dict(rotary=4, gains="shared", offset=1.0), {"query_key_gains": 2}),
    "gains of heads": (dict(rotary=2, gains="heads"), {"query_key_gains": 3}),
    "one norm over all heads": (dict(rotary=4, gains="heads", whole=True), {"query_key_gains": 2}),
    "no positions": (dict(gains="shared"), {"query_key_gains": 4}),
    "equal gains": (dict(rotary=4, gains="equal"), {"query_key_gains": 2, "query_key_turns": 2}),
    "equal gains, opposite signs": (dict(rotary=4, gains="signs"), {"query_key_gains": 2, "query_key_turns": 2}),
    "equal gains, neighbours": (
        dict(rotary=4, gains="equal", interleaved=True), {"query_key_gains": 2, "query_key_turns": 2}
    ),
    "equal products": (dict(gains="products"), {"query_key_gains": 4, "query_key_turns": 6}),
    "equal gains, one norm": (dict(rotary=4, gains="equal", whole=True), {"query_key_gains": 2, "query_key_turns": 2}),
    "means": (dict(rotary=2, gains="heads", centred=True), {"query_key_gains": 3, "query_key_means": 3 * 6}),
    "means, equal gains": (dict(rotary=4, gains="equal", centred=True), {"query_key_gains": 2, "query_key_means": 18}),
    "means, one norm": (
        dict(rotary=4, gains="heads", centred=True, whole=True), {"query_key_gains": 2, "query_key_means": 2 * 6}
    ),
}  # fmt: skip
ACTING = [(case, name) for case, (_, groups) in CASES.items() for name in groups]


def gains(kind):
    """(of queries, of keys) for two query heads and one key head."""
    if kind == "heads":
        return 0.5 + torch.rand(2, WIDTH).double(), 0.5 + torch.rand(1, WIDTH).double()
    shared = 0.5 + torch.rand(2, 1, WIDTH).double()
    if kind == "equal":
        shared = shared[..., :1].expand(-1, -1, WIDTH).clone()
    if kind == "signs":
        shared = shared[..., :1] * torch.tensor([[[1.0, 1, -1, 1]], [[1.0, -1, 1, 1]]]).double()
    if kind == "products":
        shared[1] = 0.7 / shared[0]
    return shared[0], shared[1]


def build(case):
    what = dict(CASES[case][0])
    kind, offset = what.pop("gains", None), what.pop("offset", 0.0)
    norm = {name: what.pop(name) for name in ("whole", "centred") if name in what}
    torch.manual_seed(3)

    def projection(*shape, bias):
        return Projection(torch.randn(*shape).double(), torch.randn(*bias).double())

    norms = None
    if kind is not None:
        of_q, of_k = gains(kind)
        norms = Norms(of_q - offset, of_k - offset, 1e-2, offset, **norm)
    return AttentionView(
        projection(2, INPUTS, WIDTH, bias=(2, WIDTH)),
        projection(1, INPUTS, WIDTH, bias=(1, WIDTH)),
        projection(1, INPUTS, 3, bias=(1, 3)),
        projection(2, 3, INPUTS, bias=(INPUTS,)),
        scale=0.5,
        causal=True,
        rotary_base=50.0,
        barred={} if norms is None else dict.fromkeys(("query_key", "key_bias"), "norms"),
        norms=norms,
        **what,
    )


def leaves(view):
    """All numbers of a view, and the way back."""
    parts = [tensor for part in (view.q, view.k, view.v, view.o) for tensor in (part.weight, part.bias)]
    return parts + ([] if view.norms is None else [view.norms.q, view.norms.k])


def with_leaves(view, tensors):
    q, k, v, o = (Projection(*tensors[i : i + 2]) for i in range(0, 8, 2))
    norms = None if view.norms is None else replace(view.norms, q=tensors[8], k=tensors[9])
    return replace(view, q=q, k=k, v=v, o=o, norms=norms)


def difference(view, other):
    x = torch.randn(2, 9, INPUTS, dtype=torch.float64)
    expected = view.attend(x)
    return ((other.attend(x) - expected).norm() / expected.norm()).item()


def moved(view, name, seed=1):
    symmetry = SYMMETRIES[name]
    return symmetry.act(view, symmetry.random(view, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("case", CASES)
def test_dimensions_are_those_by_hand_and_none_is_missing(case):
    """The nullity of the Jacobian of everything the view computes, with respect to every number in it, is their sum."""
    view = build(case)
    counts = count(view)
    by_hand = CASES[case][1] | {"value_output": 9, "value_bias": 3}
    assert {name: size for name, size in counts.items() if size} == by_hand
    x = torch.randn(16, 6, INPUTS, dtype=torch.float64)
    start = leaves(view)
    sizes = [tensor.numel() for tensor in start]

    def outputs(flat):
        pieces = [piece.view_as(tensor) for piece, tensor in zip(flat.split(sizes), start, strict=True)]
        return with_leaves(view, pieces).attend(x).flatten()

    jacobian = torch.func.jacfwd(outputs)(torch.cat([tensor.flatten() for tensor in start]))
    spectrum = torch.linalg.svdvals(jacobian)
    assert len(jacobian) > sum(sizes)
    assert int((spectrum < 1e-11 * spectrum[0]).sum()) == sum(counts.values())


@pytest.mark.parametrize("case, name", ACTING)
def test_a_random_element_leaves_the_output_unchanged_and_is_a_member(case, name):
    view = build(case)
    other = moved(view, name)
    assert difference(view, other) < NOISE
    assert max((a - b).abs().max() for a, b in zip(leaves(view), leaves(other), strict=True)) > 1e-2
    for group, symmetry in SYMMETRIES.items():
        if symmetry.dimension(view):
            assert symmetry.contains(view, other) == (group == name), group


def outside(view, name, other):
    """The same motion on one side only."""
    if name == "query_key_gains":
        return replace(other, norms=replace(other.norms, k=view.norms.k))
    if name == "plain_key_bias":
        return replace(view, k=Projection(view.k.weight + (other.k.bias - view.k.bias)[:, None], view.k.bias))
    if name == "query_key_means":  # another number for each channel
        slope = torch.arange(WIDTH, dtype=torch.float64)
        return replace(view, q=replace(view.q, weight=view.q.weight + 0.1 * slope))
    return replace(other, k=view.k)


@pytest.mark.parametrize("case, name", ACTING)
def test_what_is_outside_changes_the_output(case, name):
    view = build(case)
    other = outside(view, name, moved(view, name))
    assert difference(view, other) > 1e-3
    assert not SYMMETRIES[name].contains(view, other)


@pytest.mark.parametrize("case, name", ACTING)
def test_fix_is_one_point_of_the_orbit(case, name):
    symmetry, view = SYMMETRIES[name], build(case)
    fixed = symmetry.fix(view)
    assert difference(view, fixed) < NOISE and symmetry.contains(view, fixed)
    for start in (fixed, moved(view, name)):
        for a, b in zip(leaves(symmetry.fix(start)), leaves(fixed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_fixed_pair_of_keys_has_one_row_one_zero_and_none_longer():
    view = build("interleaved")
    weight = SYMMETRIES["rotary_pairs"].fix(view).k.weight[0]
    for pair in view.pairs.mT:
        lengths = weight[:, pair].norm(dim=1)
        assert weight[lengths.argmax(), pair].tolist() == [1.0, 0.0] and lengths.max() <= 1 + EPS
    dead = replace(view, k=Projection(torch.zeros_like(view.k.weight), view.k.bias))
    assert torch.equal(SYMMETRIES["rotary_pairs"].fix(dead).k.weight, dead.k.weight)


def test_idle_channels_count_as_gone():
    view = replace(build("partial"), channels=((0, 1, 3),))
    assert count(view)["rotary_pairs"] == 2 and count(view)["plain_query_key"] == 1
    assert count(replace(build("rotary"), channels=((1, 3),)))["rotary_pairs"] == 2


def test_views_without_numbers_have_gains_of_their_own():
    """From a config alone no two gains agree."""
    view = build("equal gains")
    meta = {part: Projection(getattr(view, part).weight.to("meta")) for part in "qkvo"}
    norms = replace(view.norms, q=view.norms.q.to("meta"), k=view.norms.k.to("meta"))
    counts = count(replace(view, **meta, norms=norms))
    assert counts["query_key_gains"] == 2 and counts["query_key_turns"] == 0


def test_rotations_of_channels_whose_gains_differ_are_refused():
    view = build("equal gains")
    turn = torch.linalg.qr(torch.randn(1, WIDTH, WIDTH, dtype=torch.float64)).Q
    with pytest.raises(ValueError, match="expected zeros between channels whose gains differ"):
        SYMMETRIES["query_key_turns"].act(view, turn)
    for name, reason in (("query_key_means", "subtract the mean"), ("rotary_pairs", "norms")):
        with pytest.raises(ValueError, match=f"{name}: this view has no such freedom .*{reason}"):
            SYMMETRIES[name].act(view, torch.zeros(0))
