"""Two ranks, each with half of the heads: outputs, losses, gradients and generated tokens are those of one process."""

from pathlib import Path

import pytest
import torch

import gaugekit as gk
import gaugekit.integrations.transformers
from tiny import add_tokenizer
from two_ranks import on_two_ranks


def whole_gradients(model) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in model.named_parameters()}  # fmt: skip


def cut(path: Path, **options):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto")
    options = {"dtype": torch.float64} | options
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, **options).eval()


def agree(path: Path, cut_parameters: set[str], ids: torch.Tensor) -> None:
    """A directory's model on one process and cut: everything it gives, and what it is cut in."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    shared = cut(path)
    held = {name for name, p in shared.named_parameters() if isinstance(p, DTensor)}
    assert cut_parameters <= held
    for name in cut_parameters:
        p = shared.get_parameter(name)
        assert 2 * p.to_local().numel() == p.numel(), name
    outputs = [model(ids, labels=ids) for model in (alone, shared)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-12, atol=0)
    for output in outputs:
        output.loss.backward()
    expected, given = (whole_gradients(model) for model in (alone, shared))
    assert expected.keys() == given.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            given[name], gradient, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        quiet = shared(ids).logits  # the path without gradients is another
        torch.testing.assert_close(quiet, outputs[0].logits, rtol=1e-10, atol=1e-12)
        tokens = [
            m.generate(ids[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (alone, shared)
        ]
    assert torch.equal(*tokens)


def sas(folder: Path, name: str, **options) -> Path:
    """A SAS model none of whose parameters is zero, saved by rank 0."""
    from gaugekit.hf.sas import SASConfig, SASForCausalLM

    path = folder / name
    config = SASConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, **options)
    model = SASForCausalLM(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(path)
    torch.distributed.barrier()
    return path


def sas_models(folder):
    ids = torch.randint(1, 50, (2, 9))
    held = {
        "model.layers.1.attention.alpha",
        "model.layers.1.attention.query.weight",
        "model.layers.1.mlp.up.weight",
    }
    first = {"model.layers.0.attention.value.weight"}
    agree(sas(folder, "sas"), held | first, ids)
    grouped = {"num_key_value_heads": 2, "rope": True, "hidden_act": "swiglu", "sliding_window": 4}
    agree(sas(folder, "sas_p", block="sas_p", norm="none", **grouped), held | first, ids)
    without = {"queries": False, "first_value": False, "outputs": True}
    of_layer = {"model.layers.1.attention.output.weight", "model.layers.1.attention.key.weight"}
    agree(sas(folder, "skipless", block="skipless", norm="rms", **without), of_layer, ids)
    agree(sas(folder, "pre_ln", block="pre_ln"), {"model.layers.1.attention.output.weight"}, ids)


def llama(folder: Path, **options) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 50, "attention_bias": True}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes)).double()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder / "llama")
        gk.convert(folder / "llama", folder / "converted", [gk.symmetry.GaugeFix()])
        gk.codec.pack(folder / "converted", folder / "packed")
        gk.convert(
            folder / "llama",
            folder / "truncated",
            [gk.rank.Truncate([[6, 4], [8, 2]]), gk.symmetry.GaugeFix()],
        )
    torch.distributed.barrier()
    return folder / "converted"


def converted_models(folder):
    path = llama(folder)
    compact = {"model.layers.0.self_attn.v_proj.free", "model.layers.1.self_attn.v_proj.free"}
    compact.add("model.layers.0.self_attn.q_proj.weight")
    ids = torch.randint(1, 50, (2, 9))
    agree(path, compact, ids)
    agree(folder / "truncated", {"model.layers.1.self_attn.v_proj.free"}, ids)  # heads of different ranks
    agree(folder / "packed", compact, ids)  # each rank decodes what it reads of a packed file


def fully_sharded_by_transformers(folder):
    """DistributedConfig(fsdp_size=2): a SAS model whose ranks each hold half of every parameter."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    path = sas(folder, "whole")
    alone, shared = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **more).train()
        for more in ({}, {"distributed_config": DistributedConfig(fsdp_size=2)})
    )
    ids = torch.randint(1, 50, (4, 9))
    assert all(isinstance(p, DTensor) for p in shared.parameters())
    alone(ids, labels=ids).loss.backward()
    mine = ids.chunk(2)[torch.distributed.get_rank()]
    shared(mine, labels=mine).loss.backward()
    for name, p in alone.named_parameters():
        gradient = shared.get_parameter(name).grad.full_tensor()
        assert (gradient - p.grad).norm() <= 1e-10 * p.grad.norm(), name


def phi(folder: Path) -> Path:
    """A converted model whose queries, keys and values are one projection."""
    from transformers import Phi3Config, Phi3ForCausalLM

    if torch.distributed.get_rank() == 0:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
        Phi3ForCausalLM(Phi3Config(**sizes)).save_pretrained(folder / "phi")
        gk.convert(folder / "phi", folder / "fused", [gk.symmetry.GaugeFix()])
    torch.distributed.barrier()
    return folder / "fused"


def sliced(folder: Path) -> Path:
    if torch.distributed.get_rank() == 0:
        add_tokenizer(folder / "llama")
        (folder / "text.txt").write_text("Every reader learns a little from each of these lines. " * 40)
        sizes = {"windows": 8, "window": 32}
        gk.slicing.slice(folder / "llama", folder / "sliced", 0.25, calibration=folder / "text.txt", **sizes)
    torch.distributed.barrier()
    return folder / "sliced"


def what_cannot_be_cut_is_refused(folder):
    from gaugekit.integrations.transformers import GaugekitConfig

    with pytest.raises(ValueError, match="projections that can be cut by heads, got a Concat"):
        cut(phi(folder))
    with pytest.raises(ValueError, match="packed ones cannot be cut"):
        cut(folder / "llama", dtype=torch.bfloat16, quantization_config=GaugekitConfig(packed=True))
    with pytest.raises(ValueError, match="expected a model whose stream is not sliced"):
        cut(sliced(folder))
    odd = sas(folder, "odd", num_key_value_heads=1)
    with pytest.raises(ValueError, match="groups: expected a multiple of the 2 ranks that share them, got 1"):
        cut(odd)


def is_not_fused_where_it_is_cut(folder):
    """Nothing is replaced whose matrices no rank has as a whole; the reason is reported."""
    ids = torch.randint(1, 50, (2, 9))
    shared = cut(folder / "llama")
    expected = shared(ids).logits
    report = gk.fuse(shared)
    assert not report["replaced"] and "cut among ranks" in report["left"][0]["reason"]
    torch.testing.assert_close(shared(ids).logits, expected, rtol=1e-10, atol=1e-12)


def is_saved_whole(folder):
    """What each rank holds a part of is written as one plain directory."""
    from safetensors.torch import load_file

    shared = cut(folder / "converted")
    shared.save_pretrained(folder / "again")
    torch.distributed.barrier()
    before, after = (load_file(folder / name / "model.safetensors") for name in ("converted", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_tensor_parallel_models(tmp_path):
    on_two_ranks(
        (
            sas_models,
            converted_models,
            fully_sharded_by_transformers,
            what_cannot_be_cut_is_refused,
            is_saved_whole,
            is_not_fused_where_it_is_cut,
        ),
        tmp_path,
    )
