"""The page of a slicing shows each junction, each form, and what every rotation gave back."""

import json
import math

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import gaugekit as gk
from sliceable import save

SIZES = dict(window=32, windows=8)


def test_the_page_and_the_certificate_of_a_coded_slicing(tmp_path):
    source, text = save("llama", tmp_path)
    report = gk.slicing.slice(
        source, tmp_path / "out", 0.25, calibration=text, rotation="bits-back", dtype="bfloat16", **SIZES
    )
    proof = json.loads((tmp_path / "out" / "gaugekit_certificate.json").read_text())
    assert [step["rewrite"] for step in proof["steps"]] == ["slice", "bits-back"]
    groups = proof["steps"][1]["groups"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What the rotations gave back" in page and "bits-back" in page
    for group in groups:
        assert f">{group['nominal_bits']:,}<" in page
    assert len(groups) == 4 and [row["layer"] for row in proof["layers"]] == [0, 1]
    assert proof["output_sha256"].keys() == {"model.safetensors"}
    # two key/value heads of two query heads each, and 48 neurons, in each of two layers
    orders = 2 * (math.log2(2) + 2 * math.log2(2) + sum(math.log2(n) for n in range(1, 49)))
    assert report["steps"][0]["permutation_bits"] == pytest.approx(orders)


def test_the_page_of_a_coded_slicing_spares_a_page_of_the_source(tmp_path):
    source, text = save("llama", tmp_path)
    (source / "report.html").write_text("the model's own")
    options = dict(calibration=text, rotation="bits-back", dtype="float16", **SIZES)
    gk.slicing.slice(source, tmp_path / "out", 0.25, **options)
    assert (tmp_path / "out" / "report.html").read_text() == "the model's own"
    assert "What the rotations gave back" in (tmp_path / "out" / "gaugekit_report.html").read_text()


def test_the_page_of_a_plain_slicing_has_no_such_table(tmp_path):
    source, text = save("gpt2", tmp_path)
    report = gk.slicing.slice(source, tmp_path / "out", 0.25, calibration=text, **SIZES)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What the rotations gave back" not in page
    for form in report["steps"][0]["forms"].values():
        assert f"{form['multiply_adds']:,}" in page
    assert "width of the stream" in str(report) and "polar" in str(report)
