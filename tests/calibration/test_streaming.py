"""The streaming pass finds what hooks on the whole model find, in the memory of one layer, through any kill."""

import gc
import json
import os
import subprocess

import pytest
import torch
from transformers import BertForMaskedLM, Cohere2Config, Cohere2ForCausalLM

from gaugekit import samples
from gaugekit.calibration import streaming
from gaugekit.files.staging import LOCK, MANIFEST
from gaugekit.hf import loading
from tiny import add_tokenizer, bert, gpt2
from warm import python

TEXT = samples.sentences(20)
INPUTS = {"bert": ["attention.self.query", "attention.output.dense"], "gpt2": ["attn.c_attn", "attn.c_proj"]}


def saved(directory, kind="gpt2", **changes):
    model = bert(BertForMaskedLM, **changes) if kind == "bert" else gpt2(**changes)
    model.save_pretrained(directory)
    add_tokenizer(directory)
    return directory


def whole(directory, paths):
    """{path: rows [n, D]} of each layer, by hooks on the whole model in float64."""
    model, found = loading.model(directory, torch.float64), []
    blocks = model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h
    for block in blocks:
        found.append({path: [] for path in paths})
        for path in paths:
            keep = found[-1][path]
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, x, keep=keep: keep.append(x[0][0])
            )
    for ids in samples.tokenize(loading.tokenizer(directory), TEXT, loading.positions(model.config)):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    return [{path: torch.cat(rows) for path, rows in layer.items()} for layer in found]


def same(left, right):
    assert [set(layer) for layer in left] == [set(layer) for layer in right]
    for ours, theirs in zip(left, right, strict=True):
        for name in ours:
            assert ours[name].count == theirs[name].count
            assert torch.equal(ours[name].total, theirs[name].total)
            assert torch.equal(ours[name].products, theirs[name].products)


@pytest.mark.parametrize("kind", INPUTS)
def test_moments_are_those_of_the_whole_model(kind, tmp_path):
    saved(tmp_path, kind)
    names = ("q", "o", INPUTS[kind][0])
    found = streaming.collect(tmp_path, TEXT, modules=names, dtype=torch.float64)
    for ours, theirs in zip(found, whole(tmp_path, INPUTS[kind]), strict=True):
        for name, path in zip(names, [*INPUTS[kind], INPUTS[kind][0]], strict=True):
            rows = theirs[path]
            assert ours[name].count == len(rows)
            torch.testing.assert_close(ours[name].mean, rows.mean(0))
            torch.testing.assert_close(ours[name].second, rows.mT @ rows / len(rows))
            torch.testing.assert_close(ours[name].covariance, torch.cov(rows.mT, correction=0))


def test_a_file_without_the_prefix_of_its_model_is_read(tmp_path):
    """Published GPT-2 files hold "h.0…", while the model with a head says "transformer.h.0…"."""
    model = gpt2()
    model.save_pretrained(tmp_path / "head")
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for name in ("head", "base"):
        add_tokenizer(tmp_path / name)
    same(*(streaming.collect(tmp_path / name, TEXT) for name in ("head", "base")))


class Stop(BaseException):
    """Ends a call in the middle."""


def stopped(source, text, work, at):
    def stop(done, total):
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        streaming.collect(source, text, work_directory=work, batch_size=7, progress=stop)


def killed(source, text, work, at):
    """The process ends without any warning: no exception, no finally."""
    code = (
        "import os, sys; from gaugekit.calibration import collect; model, text, work, at = sys.argv[1:]\n"
        "stop = lambda done, total: os._exit(9) if done == int(at) else None\n"
        "collect(model, text, work_directory=work, batch_size=7, progress=stop)"
    )
    arguments = map(str, (source, text, work, at))
    done = subprocess.run([*python(), "-W", "ignore", "-c", code, *arguments], capture_output=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize("end, at", [(stopped, 1), (stopped, 3), (stopped, 4), (stopped, 9), (killed, 5)])
def test_ended_and_resumed_is_uninterrupted(end, at, tmp_path):
    """After an end at ``at`` of 9 batches the next call goes on at the layer that was at work."""
    source = saved(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    end(source, tmp_path / "text.txt", tmp_path / "work", at)
    seen = []
    options = dict(batch_size=7, work_directory=tmp_path / "work")
    resumed = streaming.collect(
        source, tmp_path / "text.txt", **options, progress=lambda *now: seen.append(now)
    )
    # The end falls before the layer's record, so that layer's three batches run again and no earlier one does.
    assert seen == [(done, 9) for done in range((at - 1) // 3 * 3 + 1, 10)]
    same(resumed, streaming.collect(source, TEXT, batch_size=7))
    seen.clear()
    same(streaming.collect(source, TEXT, **options, progress=lambda *now: seen.append(now)), resumed)
    assert seen == []
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {MANIFEST, LOCK, "arguments", "layer_0.pt", "layer_1.pt"}


def test_no_more_than_one_layer_is_in_memory(tmp_path):
    saved(tmp_path, n_layer=6, vocab_size=28)

    def held():
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.nn.Parameter and not o.is_meta)

    before, most = held(), []
    streaming.collect(tmp_path, TEXT, progress=lambda done, total: most.append(held() - before))
    block = sum(parameter.numel() for parameter in gpt2().transformer.h[0].parameters())
    assert max(most) == block


def test_max_tokens_and_padding(tmp_path):
    saved(tmp_path)
    found = streaming.collect(tmp_path, TEXT, max_tokens=100)
    assert [layer["q"].count for layer in found] == [100, 100]
    alone = streaming.collect(tmp_path, TEXT, max_tokens=100, batch_size=1)
    torch.testing.assert_close(found[1]["q"].second, alone[1]["q"].second, rtol=1e-5, atol=1e-6)


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    source, work = saved(tmp_path / "model"), tmp_path / "work"
    found = streaming.collect(source, TEXT, work_directory=work)
    for change in ({"batch_size": 3}, {"modules": ("o",)}, {"dtype": torch.float64}, {"max_tokens": 50}):
        with pytest.raises(ValueError, match="work_directory: .* holds the work of another call"):
            streaming.collect(source, TEXT, work_directory=work, **change)
    file = source / "model.safetensors"
    before = file.stat()
    saved(source)  # the same names and sizes, other weights
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(
        ValueError, match="work_directory: .* another call .digests checkpoint model.safetensors"
    ):
        streaming.collect(source, TEXT, work_directory=work)
    assert len(found) == 2


def test_a_touched_checkpoint_is_the_same(tmp_path):
    source, work = saved(tmp_path / "model"), tmp_path / "work"
    found = streaming.collect(source, TEXT, work_directory=work)
    os.utime(source / "model.safetensors", (1, 1))
    seen = []
    again = streaming.collect(source, TEXT, work_directory=work, progress=lambda *now: seen.append(now))
    same(found, again)
    assert seen == []


@pytest.mark.parametrize("name", ["letter.txt", ".hidden", "arguments/letter.txt", "layer_0.pt"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, name):
    file = tmp_path / "full" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match="work_directory: expected .* to be free .*; it is taken"):
        streaming.collect(saved(tmp_path / "model"), TEXT, work_directory=tmp_path / "full")
    assert [path for path in (tmp_path / "full").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    source = saved(tmp_path / "model")

    def second(done, total):
        with pytest.raises(ValueError, match="work_directory: another process is writing"):
            streaming.collect(source, TEXT, work_directory=tmp_path / "work")

    streaming.collect(source, TEXT, work_directory=tmp_path / "work", progress=second)


def test_hidden_states_that_find_no_room_are_an_error(tmp_path):
    """A file that may not grow, in a process of its own: 20 KB, of which hidden states need more."""
    source = saved(tmp_path / "model")
    code = (
        "import resource, sys; from gaugekit.calibration import collect; from gaugekit import samples\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: collect(sys.argv[1], samples.sentences(20), work_directory=sys.argv[2])\n"
        "except OSError as error: print(error)\n"
    )
    command = [*python(), "-W", "ignore", "-c", code, str(source), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "hidden_0.bin" in done.stdout, (done.returncode, done.stderr)
    assert len(streaming.collect(source, TEXT, work_directory=tmp_path / "work")) == 2


def test_bad_input(tmp_path):
    source = saved(tmp_path / "model")
    for arguments, message in [
        ({"modules": ()}, "modules: expected names of modules"),
        ({"modules": "q"}, "modules: expected names of modules, got 'q'"),
        ({"modules": ("mlp.none",)}, "modules: expected q, k, v, o or a module of a block, got 'mlp.none'"),
        ({"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"max_tokens": -1}, "max_tokens: expected a positive integer, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            streaming.collect(source, TEXT, **arguments)
    with pytest.raises(ValueError, match="text: expected a UTF-8 text file"):
        streaming.collect(source, tmp_path / "absent.txt")
    gpt2().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="checkpoint: expected a tokenizer"):
        streaming.collect(tmp_path / "bare", TEXT)


@pytest.mark.parametrize("window", [4, 60])
def test_layers_that_see_other_tokens_than_the_first_are_refused(window, tmp_path):
    """Every block is given what the first was given: under a window that no text reaches, that is right."""
    config = Cohere2Config(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        layer_types=["sliding_attention", "full_attention"], sliding_window=window, pad_token_id=0,
    )  # fmt: skip
    Cohere2ForCausalLM(config).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    if window == 4:
        with pytest.raises(ValueError, match="expected layers that see a text of 12 tokens alike.*windows"):
            streaming.collect(tmp_path, ["abcdefghijkl"])
    else:
        assert len(streaming.collect(tmp_path, ["abcdefghijkl"])) == 2
