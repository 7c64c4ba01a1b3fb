"""The page a truncation leaves: every head's spectrum with a dot where it was cut, and what the certificate says."""

import json
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModel

import gaugekit as gk
from gaugekit import samples
from gaugekit.calibration.moments import observe
from gaugekit.checkpoint.writer import CERTIFICATE
from gaugekit.cli import main
from gaugekit.rank import Truncate, spectrum
from gaugekit.rank.page import pages
from gaugekit.verbs.convert import convert
from tiny import add_tokenizer, bert

TEXT = samples.sentences(12)
HEADS, WIDTH, LAYERS = 4, 8, 2


@pytest.fixture
def source(tmp_path):
    model = bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    return tmp_path / "model"


def drawings(page):
    """The figures of the page, parsed, without their legend; nothing may link to other files."""
    assert "http" not in page and "<script" not in page and "src=" not in page
    legend, *panels = [
        ElementTree.fromstring(part.split("</svg>")[0] + "</svg>")
        for part in map("<svg".__add__, page.split("<svg")[1:])
    ]
    assert "last channel kept" in [text.text for text in legend.iter("text")]
    return panels


@pytest.mark.parametrize(
    "goal", [["--rank", "5"], ["--energy", ".8"], ["--energy", ".8", "--gauge", "--pack"]]
)
def test_the_page_shows_where_each_head_was_cut(goal, source, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["convert", source, out, *goal, "--calibration", tmp_path / "text.txt", "--json"]
    assert main([*map(str, line)]) == 0
    report, proof = json.loads(capsys.readouterr().out), json.loads((out / CERTIFICATE).read_text())
    moments = observe(AutoModel.from_pretrained(source).eval(), TEXT)
    found = drawings((out / "report.html").read_text())
    assert len(found) == len(proof["layers"]) == LAYERS
    for row, drawing in zip(proof["layers"], found, strict=True):
        view = gk.models.Live(AutoModel.from_pretrained(source)).attention(row["layer"])
        values = spectrum(view, moments[row["layer"]]["q"]).values
        torch.testing.assert_close(
            torch.tensor(row["singular_values"]).double(), values, rtol=1e-4, atol=1e-6
        )
        kept = [
            float(v[:r].square().sum() / v.square().sum()) for v, r in zip(values, row["ranks"], strict=True)
        ]
        assert row["energy_kept"] == pytest.approx(kept, rel=1e-4)
        paths = [path.get("d") for path in drawing.iter("path")]
        curves, ends = paths[: HEADS + 1], [(dot.get("cx"), dot.get("cy")) for dot in drawing.iter("circle")]
        assert len(ends) == HEADS and {curve.count(",") for curve in curves} == {WIDTH}
        for curve, rank, end in zip(curves, row["ranks"], ends, strict=False):
            assert curve.lstrip("M").split("L")[rank - 1] == ",".join(end)
    if "--rank" in goal:
        assert [row["ranks"] for row in proof["layers"]] == [[5] * HEADS] * LAYERS
    else:
        assert report["steps"][0]["ranks"] == [row["ranks"] for row in proof["layers"]]


def test_ragged_ranks_leave_the_query_key_block_alone_and_the_rest_is_fixed(source, tmp_path):
    """No compact form holds identity blocks of different sizes: the plan, the file and the certificate say so."""
    ranks = [[3, 5, 2, 8], [4] * HEADS]
    report = convert(source, tmp_path / "out", [Truncate(ranks), gk.symmetry.GaugeFix(key_ranks=ranks)])
    removed = report["steps"][1]["removed"]
    assert removed["query_key"] == HEADS * 4**2  # of the second layer, whose ranks agree
    assert (
        removed["value_output"] == LAYERS * HEADS * WIDTH**2
        and removed["value_bias"] == LAYERS * HEADS * WIDTH
    )
    assert report["parameters_before"] - report["parameters_after"] == sum(
        step["removed"]["total"] for step in report["steps"]
    )
    model = AutoModel.from_pretrained(source, dtype=torch.float64).eval()
    gk.rank.truncate(model, rank=ranks)
    import gaugekit.integrations.transformers  # noqa: F401

    loaded = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).last_hidden_state for m in (loaded, model))
    assert (found - expected).norm() < 1e-6 * expected.norm()  # the file was rounded to float32


def test_pages_are_for_truncations_and_survive_a_kill(source, tmp_path):
    convert(source, tmp_path / "gauge", [gk.symmetry.GaugeFix()], pages=pages)
    assert not (tmp_path / "gauge" / "report.html").exists()

    def stop(certificate):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", [Truncate(4)], pages=stop)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", [Truncate(4)], pages=pages)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of the weights alone" in page and len(drawings(page)) == LAYERS
