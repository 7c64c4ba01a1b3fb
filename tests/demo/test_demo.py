"""The demo on a small model with random weights: every number of the report, the page, and a second run."""

import functools
import json
import sys
from html.parser import HTMLParser

import pytest

import tiny_directory
from gaugekit import codec
from gaugekit.cli import main
from gaugekit.demo import speed, steps
from tiny_directory import BIAS, LAYERS, SQUARE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_directory.write(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    """(report, directory) of one run."""
    directory = tmp_path_factory.mktemp("demo") / "out"
    return steps.run(directory, model=source, sentences=24, seconds=0.2), directory


def test_report_json_holds_the_report(done):
    report, directory = done
    assert json.loads((directory / "report.json").read_text()) == json.loads(report.json())


def test_counts(done):
    report, _ = done
    assert report["parameters_removed"] == {
        "value_output": SQUARE,
        "query_key": SQUARE,
        "key_bias": BIAS,
        "value_bias": BIAS,
        "total": 2 * SQUARE + 2 * BIAS,
    }
    assert report["parameters_before"] - report["parameters_after"] == report["parameters_removed"]["total"]


def test_both_proofs_hold(done):
    report, _ = done
    for kind, bound in (("fp32", 1.5), ("bf16", 1.2)):
        proof = report[kind]
        assert proof["ok"] and 0 < proof["relative_error"] <= bound * proof["noise"]
        assert proof["min_cosine"] > 0.999 and len(proof["layers"]) == LAYERS + 1


def test_both_roads_lead_to_the_same_embeddings(done):
    report, _ = done
    assert len(report["loaded"]) == 2
    for found in report["loaded"].values():
        assert found["ok"] and found["max_abs_error"] < 1e-5


def test_packing_is_lossless_and_counted(done):
    report, directory = done
    for kind, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        row = report["pack"][kind]
        packed = directory / "models" / f"original-{dtype}.packed.safetensors"
        assert row["bit_exact"] and row["bytes_after"] == packed.stat().st_size
        assert row["ratio"] == pytest.approx(row["bytes_after"] / row["bytes_before"])
        assert report["bytes"][kind]["original"] == row["bytes_before"]
    assert report["pack"]["fp32"]["bytes_before"] > 1.9 * report["pack"]["bf16"]["bytes_before"]


def test_a_file_that_comes_back_changed_is_reported(source, tmp_path, monkeypatch):
    """bit_exact is a comparison, not a promise: an unpack that loses one bit makes it false."""

    def careless(packed, restored, **rest):
        codec.unpack(packed, restored, **rest)
        content = bytearray(restored.read_bytes())
        content[-1] ^= 1
        restored.write_bytes(content)

    monkeypatch.setattr(steps, "unpack", careless)
    weights = source / "model.safetensors"
    assert not steps._round_trip(weights, tmp_path / "packed.safetensors", None)["bit_exact"]


def test_speeds_are_measured(done):
    report, _ = done
    coding, block = report["speed"]["coding"], report["speed"]["attention"]
    assert coding["rounds"] >= 1
    for row in coding["coders"].values():
        assert row["pack_gb_s"] > 0 and row["unpack_gb_s"] > 0 and 0 < row["ratio"] < 1
    assert block["ratio"] > 0 and block["rounds"] >= 1
    assert report["seconds"]["total"] == pytest.approx(
        sum(value for step, value in report["seconds"].items() if step != "total")
    )


def test_speeds_by_hand(source, monkeypatch):
    """Medians over the rounds: 6 ms, and 2 ms; of the pairs' ratios 2, 3 and 50 the median is 3. A coder's speed is
    its bytes over the median of its seconds.
    """
    rounds = {"standard": [0.004, 0.006, 0.1], "value_free": [0.002, 0.002, 0.002]}
    monkeypatch.setattr(speed, "interleaved", lambda calls, seconds, progress: rounds)
    block = speed.attention(1.0)
    assert (block["standard_ms"], block["value_free_ms"]) == pytest.approx((6, 2))
    assert block["ratio"] == pytest.approx(3) and block["rounds"] == 3

    def coded(calls, seconds, progress):
        for call in calls.values():
            call()
        return {call: [0.5, 0.25, 2.0] for call in calls}

    monkeypatch.setattr(speed, "interleaved", coded)
    found = speed.coding(source, 1.0)
    for row in found["coders"].values():
        if "absent" not in row:
            assert row["pack_gb_s"] == row["unpack_gb_s"] == pytest.approx(found["bytes"] / 0.5 / 1e9)


def test_without_zstandard_its_row_says_absent(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    found = speed.coding(source, 0.1)
    assert "pip install gaugekit[demo]" in found["coders"]["zstd, level 3"]["absent"]


def test_text_names_what_counts(done):
    report, directory = done
    for text in (steps.text(report), steps.text(report, colour=True)):
        assert f"{report['parameters_removed']['total']:,}" in text
        assert str(directory / "report.html") in text and "not yet faster" in text
    assert "\x1b" not in steps.text(report)


def test_the_command_exits_1_where_a_proof_fails(done, monkeypatch, capsys):
    report, directory = done
    monkeypatch.setattr(steps, "run", lambda directory: report)
    assert main(["demo", "--directory", str(directory)]) == 0
    assert "same answers" in capsys.readouterr().out
    monkeypatch.setitem(report.fields["fp32"], "ok", False)
    assert main(["demo", "--directory", str(directory)]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_a_second_run_over_the_first(source, done, monkeypatch, capsys):
    """The command reruns over its own output, with JSON alone on stdout."""
    first, directory = done
    (directory / "report.json").write_text("{}")
    small = functools.partial(steps.run, model=source, sentences=24, seconds=0.1)
    monkeypatch.setattr(steps, "run", small)
    capsys.readouterr()
    assert main(["demo", "--directory", str(directory), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert json.loads((directory / "report.json").read_text()) == again
    for key in ("parameters_removed", "fp32", "bf16", "bytes", "exponents", "layers"):
        assert again[key] == first[key], key


def test_what_is_not_the_demos_stays(source, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious").touch()
    with pytest.raises(ValueError, match="directory"):
        steps.run(tmp_path, model=source)
    assert main(["demo", "--directory", str(tmp_path)]) == 2
    assert "directory: expected" in capsys.readouterr().err
    assert (tmp_path / "models" / "precious").exists()


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_that_is_not_the_demos_stays(source, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"directory: expected .*{name} is not the demo's"):
        steps.run(tmp_path, model=source)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_workspace_loses_what_a_demo_made_and_nothing_else(tmp_path):
    models = tmp_path / "models"
    with steps._workspace(tmp_path):
        (models / "original-bfloat16").mkdir()
        (models / "original-float32.packed.safetensors").touch()
        (models / "mine").mkdir()
        (models / "mine" / "weights").touch()
        with pytest.raises(ValueError, match="another demo is writing"), steps._workspace(tmp_path):
            pass
    with steps._workspace(tmp_path):
        assert sorted(path.name for path in models.iterdir()) == [steps.MARK, "mine"]
        assert (models / "mine" / "weights").exists()


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a page refers to and says."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.references, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def html(done):
    return (done[1] / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_self_contained(html):
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [] and page.references == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_every_figure_has_a_drawing_and_a_caption(html):
    page = Page()
    page.feed(html)
    figures = page.tags.count("figure")
    assert figures == page.tags.count("figcaption") == 8
    assert page.tags.count("svg") == page.tags.count("desc") == figures - 1 + LAYERS


def test_page_says_what_the_report_says(html, done):
    report = json.loads((done[1] / "report.json").read_text())
    page = Page()
    page.feed(html)
    said = " ".join(" ".join(page.words).split())
    for words in (
        report["model"],
        f"{report['parameters_removed']['total']:,}",
        f"{report['pack']['bf16']['bytes_after']:,}",
        f"{report['bf16']['min_cosine']:.7f}",
        f"{report['speed']['attention']['standard_ms']:.1f} ms",
        report["machine"]["name"],
        *report["limits"],
    ):
        assert words in said
