"""Generates with a model cut by heads among two processes, and sees that one process gives the same tokens.

Without ``--model`` it makes a SAS model with random weights (no value and output matrices: where another model has one,
each process takes a slice of the input). ``--model DIR`` takes a directory of yours: a SAS model, one that ``gaugekit
convert`` wrote, or any that transformers has a tensor parallel plan for; the processes have to share its key heads.

    python examples/tensor_parallel_generate.py
    torchrun --nproc-per-node 4 examples/tensor_parallel_generate.py --model DIR
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import gaugekit.integrations.transformers  # noqa: F401 - registers the models and their plans
from gaugekit.integrations.sas import SASConfig, SASForCausalLM


def make(folder: Path, quick: bool) -> Path:
    """A SAS model with random weights, that generates something: W_Q, which starts at zero, included."""
    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        if quick
        else {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12}
    )
    model = SASForCausalLM(
        SASConfig(vocab_size=4096, rope=True, beta_ff=0.3, tie_word_embeddings=False, **sizes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("query.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def generate(model, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    new = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return new[:, ids.shape[1] :], time.perf_counter() - began


def held(model) -> float:
    """MB of parameters this process holds."""
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(part.nbytes for part in parts) / 1e6


def work(path: Path, tokens: int) -> None:
    """What every process does."""
    cut = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    ids = torch.randint(1, cut.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    new, seconds = generate(cut, ids, tokens)
    if torch.distributed.get_rank() == 0:
        alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        expected, alone_seconds = generate(alone, ids, tokens)
        count = torch.distributed.get_world_size()
        print(f"tokens: {new[0, :10].tolist()} ...")
        print(f"parameters: {held(alone):.1f} MB in one process, {held(cut):.1f} MB in each of {count}")
        print(f"{tokens} tokens: {alone_seconds:.2f} s in one process, {seconds:.2f} s cut")
        print("the same tokens:", torch.equal(new, expected), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def start(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    """One of two processes on this machine, where torchrun started none."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    path = arguments.model or Path(folder) / "model"
    if rank == 0 and not arguments.model:
        make(path, arguments.quick)
    torch.distributed.barrier()
    work(path, arguments.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a model directory (default: a SAS model with random weights)"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a very small model, a few tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens = 8
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if arguments.model is None:
            parser.error("--model: expected a directory that every process can read")
        work(arguments.model, arguments.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        method = "fork" if hasattr(os, "fork") else "spawn"
        torch.multiprocessing.start_processes(start, (folder, arguments), nprocs=2, start_method=method)


if __name__ == "__main__":
    main()
