"""A sliced model in a file that hides bits of it in its rotations: the same model, fewer bytes, no damage unnoticed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk
from gaugekit.codec import CorruptFile
from gaugekit.hf import loading
from sliceable import exact, ids, save

SIZES = dict(window=32, windows=8)


@pytest.fixture(scope="module", params=["llama tied", "gpt2", "phi"])
def coded(request, tmp_path_factory):
    """(name, folder with "bits" in float16 and "dense" in float64, the report of "bits")."""
    folder = tmp_path_factory.mktemp("bits")
    source, text = save(request.param, folder)
    options = dict(calibration=text, head=request.param == "phi", **SIZES)
    report = gk.slicing.slice(source, folder / "bits", 0.25, rotation="bits-back", dtype="float16", **options)
    gk.slicing.slice(source, folder / "dense", 0.25, rotation="dense", **options)
    return request.param, folder, report


def logits(directory):
    with torch.no_grad():
        return exact(loading.model(directory, torch.float64))(ids()).logits


def test_it_is_the_sliced_model_rounded_once(coded, tmp_path):
    _, folder, _ = coded
    expected = logits(folder / "dense")
    model = exact(loading.model(folder / "dense", torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().double())
        rounded = model(ids()).logits
    error, own = ((y - expected).norm() / expected.norm() for y in (logits(folder / "bits"), rounded))
    assert 0 < error < 2 * own


def test_the_rotations_give_back_most_of_what_they_take(coded):
    _, _, report = coded
    step = next(step for step in report["steps"] if step["rewrite"] == "bits-back")
    dimensions = [group["dimension"] for group in step["groups"]]
    assert set(dimensions) == {24}
    assert step["degrees_of_freedom"] == len(dimensions) * 24 * 23 // 2
    assert step["nominal_bits"] == 16 * step["degrees_of_freedom"]
    assert 11 < step["realised_bits"] / step["degrees_of_freedom"] < 16
    assert step["claim"] == "exact" and report["bytes_after"] < report["bytes_before"]


def test_unpacked_it_is_an_ordinary_sliced_directory(coded, tmp_path):
    _, folder, _ = coded
    gk.codec.unpack(folder / "bits", tmp_path / "plain")
    plain, packed = (path / "model.safetensors" for path in (tmp_path / "plain", folder / "bits"))
    assert torch.equal(logits(tmp_path / "plain"), logits(folder / "bits"))
    with gk.codec.safe_open(packed) as file, gk.codec.safe_open(plain) as other:
        assert file.packed and not other.packed and file.keys() == other.keys()
        assert file.metadata() == other.metadata() == {"format": "pt"}
        for name in file.offset_keys():
            assert torch.equal(file.get_tensor(name), other.get_tensor(name))
            assert torch.equal(file.get_slice(name)[1:3], other.get_slice(name)[1:3])
        assert sum(map(file.stored_bytes, file.keys())) <= packed.stat().st_size
    saved = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert saved["dtype"] == "float16" and saved["quantization_config"]["sliced"]["form"] == "dense"
    with pytest.raises(ValueError, match="is packed already"):
        gk.codec.pack(packed, tmp_path / "again.safetensors")


def test_one_flipped_bit_anywhere_is_reported(coded, tmp_path):
    _, folder, _ = coded
    content = (folder / "bits" / "model.safetensors").read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for place in (9, 60, 400, *range(800, len(content), len(content) // 40), len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        damaged.write_bytes(flipped)
        with pytest.raises(CorruptFile), gk.codec.safe_open(damaged) as file:
            for name in file.offset_keys():
                file.get_tensor(name)
        with pytest.raises(CorruptFile):
            gk.codec.unpack(damaged, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    for size in (0, 7, 500, len(content) - 1):
        damaged.write_bytes(content[:size])
        with pytest.raises(CorruptFile), gk.codec.safe_open(damaged) as file:
            file.get_tensor("lm_head.weight")


def test_a_kill_while_it_is_coded_is_gone_on_from(tmp_path, monkeypatch):
    from gaugekit.slicing import chain, principal

    source, text = save("gpt2", tmp_path)
    options = dict(calibration=text, rotation="bits-back", dtype="bfloat16", **SIZES)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(target, *_):
            target.write_bytes(b"half a file")
            raise KeyboardInterrupt

        patch.setattr(chain, "save_chain", stop)
        gk.slicing.slice(source, tmp_path / "out", 0.25, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished work of another call .*dtype differs"):
        gk.slicing.slice(source, tmp_path / "out", 0.25, **{**options, "dtype": "float16"})
    monkeypatch.setattr(principal, "find", None)  # the text was read before
    gk.slicing.slice(source, tmp_path / "out", 0.25, **options)
    assert logits(tmp_path / "out").isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("name", ["llama tied", "phi"])
def test_integers_are_read_as_the_dtype_that_was_asked_for(name, tmp_path):
    source, text = save(name, tmp_path)
    options = dict(calibration=text, rotation="bits-back", dtype="float16", head=name == "phi", **SIZES)
    report = gk.slicing.slice(source, tmp_path / "int8", 0.25, quantize="int8", **options)
    plain = gk.slicing.slice(source, tmp_path / "plain", 0.25, **options)
    step, own = report["steps"][-1], plain["steps"][-1]
    assert (step["claim"], step["stored"]) == ("approximate", "int8")
    assert 5 < step["realised_bits"] / step["degrees_of_freedom"] < 8
    weights, own_weights = (sum(group["weights_bits"] for group in x["groups"]) for x in (step, own))
    assert 0.4 < weights / own_weights < 0.7  # the file's tables weigh more than so small a model
    assert step["degrees_of_freedom"] == own["degrees_of_freedom"]
    expected, got = logits(tmp_path / "plain"), logits(tmp_path / "int8")
    model = exact(loading.model(tmp_path / "plain", torch.float64))
    with torch.no_grad():  # what integers with a scale a row cost another basis of the same model
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
        rounded = model(ids()).logits
    error, own = ((y - expected).norm() / expected.norm() for y in (got, rounded))
    assert 0 < error < 2 * own
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["dtype"] == "float16"
    gk.codec.unpack(tmp_path / "int8", tmp_path / "unpacked")
    assert torch.equal(logits(tmp_path / "unpacked"), got)
    with gk.codec.safe_open(tmp_path / "int8" / "model.safetensors") as file:
        assert not any(name.endswith(".scale") for name in file.keys())  # noqa: SIM118 - not a mapping
    assert "matrices as int8" in (tmp_path / "int8" / "report.html").read_text() and "as int8" in str(report)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_weight_beyond_the_dtype_is_refused(quantize, tmp_path):
    source, text = save("llama", tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = dict(calibration=text, rotation="bits-back", dtype="float16", quantize=quantize, **SIZES)
    with pytest.raises(ValueError, match="lm_head.weight: .* beyond torch.float16"):
        gk.slicing.slice(source, tmp_path / "out", 0.25, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float32"},
            "dtype: expected bfloat16 or float16 beside rotation='bits-back', got torch.float32",
        ),
        ({}, "dtype: expected bfloat16 or float16 beside rotation='bits-back', got torch.float64"),
        ({"dtype": "float16", "pack": True}, "pack: expected False beside rotation='bits-back'"),
        ({"dtype": "float16", "quantize": "int4"}, "quantize: expected 'int8' or None, got 'int4'"),
        ({"rotation": "polar", "quantize": "int8"}, "quantize: expected beside rotation='bits-back', got"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, message):
    source, text = save("gpt2", tmp_path)
    with pytest.raises(ValueError, match=message):
        gk.slicing.slice(source, tmp_path / "out", calibration=text, **{"rotation": "bits-back", **options})
