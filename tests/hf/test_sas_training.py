"""SAS models in training: losses, gradient checkpointing, torch.compile, the Trainer."""

import copy
import importlib.util

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache

from gaugekit.hf.sas import SASConfig, SASForCausalLM, SASForMaskedLM
from gaugekit.nn import parameter_groups

BLOCKS = ["sas", "sas_p", "pre_ln"]


def model(block="sas", cls=SASForCausalLM, **changes):
    sizes = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    return cls(SASConfig(**(sizes | {"block": block} | changes)))


def test_losses():
    ids = torch.randint(1, 61, (3, 9))
    causal = model().double()
    out = causal(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss.float(), expected)
    masked = model(cls=SASForMaskedLM)
    labels = torch.where(torch.rand(3, 9) < 0.3, ids, -100)
    out = masked(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)


def sum_over_one_process(_, bucket):
    summed = torch.futures.Future()
    summed.set_result(bucket.buffer())
    return summed


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_is_used_by_distributed_training(block):
    """DistributedDataParallel refuses a second step where the first left a parameter without gradient."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        replica = torch.nn.parallel.DistributedDataParallel(model(block))
        replica.register_comm_hook(None, sum_over_one_process)
        ids = torch.randint(1, 61, (2, 8))
        for _ in range(2):
            replica(ids, labels=ids).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_checkpointing(block, reentrant):
    plain = model(block).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    calls = []
    saving.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(1, 61, (2, 8))
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    for made in (plain, saving):
        made(ids, attention_mask=mask, labels=ids).loss.backward()
    assert len(calls) == 2, "the block is run again in the backward pass"
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("block", "masked"), [("sas", True), ("sas_p", False), ("pre_ln", True)])
def test_under_compile(block, masked):
    made = model(block, n_layer=1).train()
    ids = torch.randint(1, 61, (2, 8))
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]) if masked else None
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(made), fullgraph=True, backend=counter)
    losses = [run(ids, attention_mask=mask, labels=ids).loss for run in (compiled, made)]
    for loss in losses:
        loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(compiled.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_decoding_under_compile():
    made = model(n_layer=1).eval()
    compiled = torch.compile(copy.deepcopy(made), backend="eager", dynamic=True)
    ids = torch.randint(1, 61, (2, 6))
    results = []
    with torch.no_grad():
        for run in (compiled, made):
            cache = DynamicCache(config=made.config)
            parts = [run(ids[:, :4], past_key_values=cache).logits]
            parts += [run(ids[:, t : t + 1], past_key_values=cache).logits for t in (4, 5)]
            results.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*results)


def test_it_learns():
    """Counting upwards: from ln 61 to nearly nothing."""
    torch.manual_seed(0)
    made = model().train()
    optimiser = torch.optim.AdamW(parameter_groups(made, 0.1), lr=3e-3)
    for _ in range(120):
        ids = (torch.randint(1, 61, (16, 1)) + torch.arange(8)) % 60 + 1
        loss = made(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)
def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    made = model(pad_token_id=None)
    rows = [
        {"input_ids": row, "labels": row}
        for row in (torch.randint(1, 61, (16, 1)) + torch.arange(8)) % 60 + 1
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[],
        use_cpu=True, activation_checkpointing=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(parameter_groups(made), lr=1e-2)
    trainer = Trainer(
        made, arguments, train_dataset=rows, eval_dataset=rows[:4], optimizers=(optimiser, None)
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    again = SASForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    ids = rows[0]["input_ids"][None]
    assert torch.equal(again.eval()(ids).logits, made.eval()(ids).logits)
