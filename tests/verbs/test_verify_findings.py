"""verify's verdict by numbers worked by hand, what is not finite, which dtype counts, and what it costs."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

import gaugekit.verbs.verify
from gaugekit import samples
from gaugekit.hf import loading
from gaugekit.verbs.verify import _Comparison, allowed
from gaugekit.verbs.verify_runs import LOGITS, SMALL, TOKENS, Kept, Output, affordable, text_batches
from tiny import bert, copy_of, gpt2

NAN = float("nan")


def compared(dtype, original, result, hidden=((1.0,), (1.0,), (1.0,))):
    """The report for a reference [3, 4] of norm 5, beside which the outputs of both models are given."""
    r, p, y = (
        Output(
            "logits", torch.tensor([row], dtype=torch.float64), [torch.tensor([state], dtype=torch.float64)]
        )
        for row, state in zip(([3.0, 4.0], original, result), hidden, strict=True)
    )
    comparison = _Comparison(torch.float64, dtype)
    with Kept() as reference, Kept() as plain:
        reference.add(r)
        plain.add(p)
        comparison.original(reference, [p])
        comparison.result(reference, plain, [y])
    return comparison.report(1, [])


def test_the_errors_allowed_worked_by_hand():
    assert allowed(2e-7, torch.float32) == pytest.approx(3e-7)
    assert allowed(5e-3, torch.bfloat16) == allowed(5e-3, torch.float16) == pytest.approx(6e-3)
    assert allowed(0.0, torch.float64) == allowed(1.0, torch.float64) == 1e-12


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [(torch.float32, 4.74, 4.76), (torch.bfloat16, 4.59, 4.61), (torch.float16, 4.59, 4.61)],
)
def test_the_verdict_turns_at_the_factor(dtype, within, beyond):
    """The original errs by 0.5 of 5, a noise of 0.1; 0.74 is 1.48 times that, 0.76 1.52, 0.59 1.18 and 0.61 1.22."""
    passed, failed = (compared(dtype, [3.0, 4.5], [3.0, last]) for last in (within, beyond))
    assert passed["ok"] is True and failed["ok"] is False
    assert passed["noise"] == failed["noise"] == pytest.approx(0.1)
    assert passed["relative_error"] == pytest.approx((within - 4) / 5)
    assert passed["max_abs_error"] == pytest.approx(within - 4.5)
    cosine = (9 + 4.5 * within) / (29.25 * (9 + within**2)) ** 0.5
    assert passed["min_cosine"] == pytest.approx(cosine)


def test_float64_allows_a_millionth_of_a_millionth():
    assert compared(torch.float64, [3.0, 4.0], [3.0, 4.0 + 4e-12])["ok"] is True
    assert compared(torch.float64, [3.0, 4.0], [3.0, 4.0 + 6e-12])["ok"] is False


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "side", ["original", "result", "hidden original", "hidden result", "hidden reference"]
)
def test_what_is_not_finite_is_a_finding_wherever_it_stands(bad, side):
    rows = {"original": [3.0, 4.5], "result": [3.0, 4.5]}
    hidden = {"hidden reference": (1.0,), "hidden original": (1.0,), "hidden result": (1.0,)}
    if side in rows:
        rows[side] = [3.0, bad]
    else:
        hidden[side] = (bad,)
    report = compared(torch.bfloat16, rows["original"], rows["result"], tuple(hidden.values()))
    assert report["ok"] is False and len(report["findings"]) == 1
    who = {"original": "the original (a) in bfloat16", "result": "the result (b) in bfloat16",
           "reference": "the original (a) in float64"}[side.split()[-1]]  # fmt: skip
    assert report["findings"][0].startswith(f"{who} is not finite: NaN or infinity in 1")
    assert ("hidden state 0" in report["findings"][0]) == side.startswith("hidden")
    assert json.loads(report.json())["findings"] == report["findings"] and report["findings"][0] in str(
        report
    )


def test_a_relative_error_beside_zeros_is_a_finding():
    a = gpt2()
    with torch.no_grad():
        a.transformer.wte.weight.zero_()  # tied: no logit is anything but zero
    b = copy_of(a)
    assert gaugekit.verify(a, copy_of(a))["ok"] is True
    with torch.no_grad():
        b.transformer.wte.weight.fill_(1.0)
    report = gaugekit.verify(a, b)
    assert report["ok"] is False and "gives only zeros" in report["findings"][0]


def test_nan_in_either_model_is_named_and_json_stays_valid():
    a, b = bert(), copy_of(bert())
    with torch.no_grad():
        b.encoder.layer[1].output.dense.bias[3] = NAN
    for first, second, who in ((a, b, "the result (b)"), (b, a, "the original (a)")):
        report = gaugekit.verify(first, second)
        assert report["ok"] is False and all(who in finding for finding in report["findings"])
        assert any("hidden state 2" in finding for finding in report["findings"])
        assert json.loads(report.json())["relative_error"] is None or second is a


@pytest.mark.parametrize("sharded", [False, True])
def test_the_dtype_is_that_of_the_models_own_weights(sharded, tmp_path):
    """Neither another file beside them nor another tensor among them has a say."""
    bert().to(torch.bfloat16).save_pretrained(tmp_path / "a", max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file() == sharded
    save_file({"stray": torch.zeros(10**5)}, tmp_path / "a" / "adapter_model.safetensors")
    assert loading.stored_dtype(tmp_path / "a") == torch.bfloat16
    assert gaugekit.verify(tmp_path / "a", tmp_path / "a")["dtype"] == "bfloat16"


def test_tensors_the_model_does_not_know_have_no_say(tmp_path):
    model = gpt2().to(torch.float16)
    model.save_pretrained(tmp_path)
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file({**tensors, "momentum": torch.zeros(10**5)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert gaugekit.verify(tmp_path, tmp_path)["dtype"] == "float16"


def test_experts_whose_grouped_products_lack_float64_are_held_against_float64_all_the_same():
    sizes = dict(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_local_experts=4
    )
    model = MixtralForCausalLM(MixtralConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    with pytest.raises(RuntimeError, match="Double"):
        copy_of(model).double()(torch.tensor([[1, 2]]))
    for dtype in ("float32", "float64"):
        report = gaugekit.verify(model, copy_of(model), dtype=dtype)
        assert report["ok"] and report["reference_dtype"] == "float64"
        assert any("experts of MixtralForCausalLM run one by one in float64" in note for note in report.notes)
    off = gaugekit.verify(model, copy_of(model, 1e-4))
    assert off["noise"] > 1e-9 and not off["ok"] and model.config._experts_implementation != "eager"


def test_a_model_that_runs_in_float32_at_most_is_held_against_float32():
    class Single(type(bert())):
        """A model with a product that exists in single precision and below only."""

        def forward(self, *arguments, **named):
            if self.dtype == torch.float64:
                raise RuntimeError("expected Float, got Double")
            return super().forward(*arguments, **named)

    model = Single(bert().config).eval()
    report = gaugekit.verify(model, model, dtype="bf16")
    assert report["ok"] and report["reference_dtype"] == "float32" and report["noise"] > 1e-3
    assert any("Single runs in float32 at most (expected Float, got Double)" in note for note in report.notes)
    report = gaugekit.verify(model, copy_of(model, 1e-4), dtype="fp64")
    assert report["dtype"] == "float32" and report["noise"] == 0 and not report["ok"]


def test_the_default_text_is_cut_to_what_is_cheap():
    sentences = [[1] * 30] * 500
    assert affordable(sentences, 22_713_216) == affordable(sentences, SMALL) == sentences
    assert sum(map(len, affordable(sentences, SMALL + 1))) == 2070 == 69 * 30  # the first to reach 2,048
    assert sum(map(len, affordable([[1] * 32] * 500, SMALL + 1))) == 2048
    assert affordable(sentences[:9], 10**12) == sentences[:9]
    assert TOKENS == 2048 and SMALL == 3 * 10**7 and LOGITS == 2**23


def test_batches_of_logits_stay_small():
    rows = [[1] * length for length in (3, 50, 50, 60, 400)]
    wide, narrow = gpt2(vocab_size=LOGITS // 120), bert()
    shapes = [list(batch.inputs["input_ids"].shape) for batch in text_batches(rows, 0, 32, wide)]
    assert shapes == [[2, 50], [2, 60], [1, 400]]
    assert [batch.size for batch in text_batches(rows, 0, 32, wide)] == [53, 110, 400]
    assert [len(batch.inputs["input_ids"]) for batch in text_batches(rows, 0, 4, narrow)] == [4, 1]
    assert len(list(samples.batches(rows, 32))) == 1


def test_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    for name in ("a", "b"):
        gpt2().to(torch.bfloat16).save_pretrained(tmp_path / name)
    alive: list[weakref.ref] = []

    def load(path, dtype, real=loading.model):
        assert all(model() is None for model in alive), "the model before is still there"
        model = real(path, dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "model", load)
    gaugekit.verify(tmp_path / "a", tmp_path / "b")
    assert len(alive) == 3


def test_a_full_temporary_folder_is_one_clear_error(monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    kept = Kept()
    kept._file.close()
    kept._file = Full()
    with pytest.raises(
        ValueError, match="expected room for the outputs .* temporary folder .*: .*No space left"
    ):
        kept.add(Output("logits", torch.zeros(1, 2), []))


def test_a_directory_that_lost_its_weights_is_refused(tmp_path):
    bert().save_pretrained(tmp_path / "a")
    shutil.move(tmp_path / "a" / "model.safetensors", tmp_path / "a" / "other.bin")
    with pytest.raises(ValueError, match="expected .safetensors files"):
        gaugekit.verify(tmp_path / "a", bert())
