"""The energy as a loss: by finite differences through a whole model, and under everything a training loop does."""

import copy

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import gaugekit as gk
from gaugekit.reference.nonlocal_energy import nonlocal_energy as reference
from helpers import assert_accurate

nn = gk.nn


def model(layers=2, dtype=torch.float32, **options):
    blocks = (nn.NeutrenoBlock(16, 4, groups=2, std=0.3, **options) for _ in range(layers))
    return nn.ValueSharing(blocks).to(dtype)


def gradients(made, x, regularizer):
    made.zero_grad()
    (made(x).square().mean() + regularizer()).backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("relative", [False, True])
def test_it_is_the_energy_of_every_attention(relative):
    made, x, seen = model(dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64), []
    regularizer = nn.NonlocalRegularizer(made, weight=0.5, relative=relative)
    for block in made.layers:
        block.attention.tap.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    made(x)
    energies = []
    for u, q, k in seen:
        energy = reference(u, q, k, causal=True)
        size = u.square().sum((2, 3)).repeat_interleave(2, dim=1) if relative else 7
        energies.append((energy / size).mean())
    expected = 0.5 * torch.stack(energies).mean().detach()
    assert_accurate(regularizer().detach(), expected, expected, ulps=64)
    assert list(regularizer.energies) == [0, 1] and regularizer.energies[0].shape == (2, 4)


@pytest.mark.parametrize("kernel", ["softmax", "symmetric"])
def test_as_a_training_loss_by_finite_differences(kernel):
    """Every parameter of a whole model, moved by 1e-6 in a random direction, in float64."""
    made, x = model(dtype=torch.float64, trained=True), torch.randn(2, 5, 16, dtype=torch.float64)
    regularizer = nn.NonlocalRegularizer(made, weight=3.0, relative=True, kernel=kernel)

    def loss():
        return made(x).square().mean() + regularizer()

    loss().backward()
    for name, parameter in made.named_parameters():
        if parameter.grad is None:  # λ of the first layer, which has no V⁰
            assert name == "layers.0.attention.lam"
            continue
        direction, before, values = torch.randn_like(parameter), parameter.detach().clone(), []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.copy_(before + step * direction)
                values.append(loss())
            parameter.copy_(before)
        slope, exact = (values[0] - values[1]) / 2e-6, (parameter.grad * direction).sum()
        assert (slope - exact).abs() <= 1e-7 * (1 + exact.abs()), name


def test_padding_is_left_out():
    made, x, lengths = model(), torch.randn(2, 7, 16), torch.tensor([7, 4])
    regularizer = nn.NonlocalRegularizer(made)
    made(x, lengths=lengths)
    padded = regularizer.energies[1][1]
    made(x[1:, :4])
    torch.testing.assert_close(padded, regularizer.energies[1][0])


def test_autocast_keeps_energies_in_float32():
    made, x = model(), torch.randn(2, 40, 16)
    regularizer = nn.NonlocalRegularizer(made)
    with torch.autocast("cpu", torch.bfloat16):
        made(x)
        loss = regularizer()
    assert loss.dtype == torch.float32 and all(
        e.dtype == torch.float32 for e in regularizer.energies.values()
    )
    cast = loss.item()
    made(x)
    assert abs(cast - regularizer().item()) < 0.02 * cast
    loss.backward()
    used = [p.grad for p in made.parameters() if p.grad is not None]
    assert len(used) > 10 and all(gradient.isfinite().all() for gradient in used)


def test_gradient_accumulation_collects_each_batch_alone():
    made, x = model(), torch.randn(4, 7, 16)
    regularizer = nn.NonlocalRegularizer(made, weight=2.0)
    whole = gradients(made, x, regularizer)
    made.zero_grad()
    for half in x.chunk(2):
        ((made(half).square().mean() + regularizer()) / 2).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_bit_and_leaves_nothing_behind():
    plain, x = model(), torch.randn(2, 7, 16)
    saving = copy.deepcopy(plain)
    saving.checkpoint = True
    regularizers = [nn.NonlocalRegularizer(made, weight=2.0) for made in (plain, saving)]
    for _ in range(2):
        same(
            *(
                gradients(m, x, r)
                for m, r in zip((saving, plain), (regularizers[1], regularizers[0]), strict=True)
            )
        )


def sum_over_one_process(_, bucket):
    summed = torch.futures.Future()
    summed.set_result(bucket.buffer())
    return summed


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    made, x = model(), torch.randn(2, 7, 16)
    regularizer = nn.NonlocalRegularizer(made, weight=2.0)
    expected = gradients(made, x, regularizer)
    replica = torch.nn.parallel.DistributedDataParallel(made)
    replica.register_comm_hook(None, sum_over_one_process)
    for _ in range(2):
        replica.zero_grad()
        (replica(x).square().mean() + regularizer()).backward()
    same({name: p.grad for name, p in made.named_parameters()}, expected)


def test_fully_sharded_data_parallel(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made, x = model(), torch.randn(2, 7, 16)
    regularizer = nn.NonlocalRegularizer(made, weight=2.0)
    expected = gradients(made, x, regularizer)
    made.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    for layer in made.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    (made(x).square().mean() + regularizer()).backward()
    found = {name: p.grad.to_local() for name, p in made.named_parameters()}
    same(found, expected)


def test_remove_and_choice_of_layers():
    made, x = model(layers=3), torch.randn(2, 7, 16)
    regularizer = nn.NonlocalRegularizer(made, layers=[2])
    made(x)
    assert list(regularizer.energies) == [2]
    regularizer.remove()
    made(x)
    assert not made.layers[2].attention.tap._forward_hooks and not made._forward_hooks


def test_bad_input():
    made = model()
    with pytest.raises(ValueError, match="layers: expected numbers of the 2 attentions with a Tap, got"):
        nn.NonlocalRegularizer(made, layers=[2])
    with pytest.raises(ValueError, match="layers: expected numbers of the 0 attentions"):
        nn.NonlocalRegularizer(torch.nn.Linear(2, 2))
    regularizer = nn.NonlocalRegularizer(made)
    with pytest.raises(ValueError, match="energies: expected a forward pass"):
        regularizer()
    windowed = model(window=3)
    nn.NonlocalRegularizer(windowed)
    with pytest.raises(ValueError, match="window: expected none"):
        windowed(torch.randn(1, 7, 16))
