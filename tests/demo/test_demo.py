"""The demo on a small model with random weights: every number of the report, the page, and a second run."""

import functools
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

import tiny_directory
from gaugekit import codec
from gaugekit.cli import main
from gaugekit.demo import page, running, speed, steps
from tiny_directory import BIAS, LAYERS, SQUARE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_directory.write(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return tiny_directory.write_speaker(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def done(source, speaker, tmp_path_factory):
    """(report, directory) of one run."""
    directory = tmp_path_factory.mktemp("demo") / "out"
    return steps.run(directory, model=source, language_model=speaker, sentences=24, seconds=0.2), directory


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
    for proof in report["loaded"].values():
        assert proof["ok"] and proof["max_abs_error"] < 1e-5


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


def test_packed_weights_run_and_are_the_same_bits(done):
    report, _ = done
    encoder, speaker = report["running"]
    for row in (encoder, speaker):
        assert row["bit_exact"] and row["bytes_after"] < row["bytes_before"]
        assert row["memory_ratio"] == pytest.approx(row["bytes_after"] / row["bytes_before"])
        assert row["plain_tokens_s"] > 0 and row["packed_tokens_s"] > 0 and row["rounds"] >= 3
    assert speaker["perplexity_tokens"] == 95 and 0 <= speaker["same_tokens"] <= speaker["new_tokens"]
    assert speaker["packed_perplexity"] == pytest.approx(speaker["plain_perplexity"], rel=0.05)
    assert report["absent"] is None


def test_a_weight_that_comes_back_changed_is_reported():
    plain = torch.nn.Linear(64, 64).bfloat16()
    packed = torch.nn.Linear(64, 64).bfloat16()
    packed.load_state_dict(plain.state_dict())
    assert running._same_bits(plain, packed)
    with torch.no_grad():
        plain.weight[3, 5], packed.weight[3, 5] = 0.0, -0.0  # equal numbers, other bits
    assert not running._same_bits(plain, packed)


def test_tokens_a_second_by_hand(monkeypatch):
    """10 tokens a step, 5, 4 and 2 s plain, 2, 2 and 2 s packed: medians 2.5 and 5 a second, ratios 2.5, 2 and 1."""
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])

    def step(seconds):
        for duration in (0.0, *seconds):  # the first step is not timed
            now[0] += duration
            yield 10

    steps = {"plain": step([5, 4, 2]), "packed": step([2, 2, 2])}
    speeds = running._in_turns(steps, 1.0, 100, None)
    assert speeds == {"plain_tokens_s": 2.5, "packed_tokens_s": 5.0, "speed_ratio": 2.0, "rounds": 3}


def test_threads_are_given_back(done):
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), steps._one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads


def test_without_a_language_model_the_page_says_why(done):
    report, _ = done
    alone = {**report.fields, "running": report["running"][:1], "absent": "it is <not> installed"}
    html = page.page(alone)
    assert "No language model was run beside it: it is &lt;not&gt; installed." in html
    assert report["running"][1]["model"] not in html


def test_what_a_report_says_is_escaped(done):
    """A model's name, a machine's and a reason are text, wherever they stand."""
    report, _ = done
    wild = 'a<script>alert("b")</script>&c'
    machine = dict.fromkeys(report["machine"], wild)
    running = [{**row, "model": wild} for row in report["running"]]
    html = page.page(
        {**report.fields, "model": wild, "machine": machine, "running": running, "limits": [wild]}
    )
    assert "<script" not in html and "a&lt;script&gt;alert(&quot;b&quot;)&lt;/script&gt;&amp;c" in html


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
    text = steps.text(report)
    assert (
        f"{report['parameters_removed']['total']:,}" in text
        and f"{report['pack']['bf16']['bytes_after']:,}" in text
    )
    assert str(directory / "report.html") in text and "not yet faster" in text and "limit 1.5 ×" in text
    assert "\x1b" not in text


def test_the_command_exits_1_where_a_proof_fails(done, monkeypatch, capsys):
    report, directory = done
    monkeypatch.setattr(steps, "run", lambda directory: report)
    assert main(["demo", "--directory", str(directory)]) == 0
    assert "not a bit was lost" in capsys.readouterr().out
    monkeypatch.setitem(report.fields["fp32"], "ok", False)
    assert main(["demo", "--directory", str(directory)]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_a_second_run_over_the_first(source, speaker, done, monkeypatch, capsys):
    """The command reruns over its own output, with JSON alone on stdout."""
    first, directory = done
    (directory / "report.json").write_text("{}")
    small = functools.partial(steps.run, model=source, language_model=speaker, sentences=24, seconds=0.1)
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
    assert figures == page.tags.count("figcaption") == 10
    assert (
        page.tags.count("svg") == page.tags.count("desc") == figures + LAYERS
    )  # the spectra's legend and panels


def test_the_page_begins_with_what_it_brings_and_ends_with_the_appendix(html, done):
    report = json.loads((done[1] / "report.json").read_text())
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings[:3] == ["What it brings", "The proof", "What nobody can observe"]
    assert headings[-1] == "Appendix: inside the weights"
    tiles = re.findall("<dd>(.*?)</dd>", html)
    speaker = report["running"][-1]
    assert tiles == [
        f"−{100 * (1 - report['pack']['bf16']['ratio']):.1f} %",
        f"−{100 * (1 - report['running'][0]['memory_ratio']):.1f} %",
        f"{speaker['plain_tokens_s']:.1f} → {speaker['packed_tokens_s']:.1f}",
        "bit-exact",
    ]
    assert html.index("Singular values") > html.index("Appendix")


def test_cells_know_their_columns(html):
    """On a phone a row is a block, and each cell stands beside its column's heading."""
    for table in re.findall("<table>.*?</table>", html, re.S):
        heads = [re.sub("<.*?>", "", head) for head in re.findall('<th(?: class="n")?>(.*?)</th>', table)]
        for row in re.findall('<tr(?: class="total")?>(.*?)</tr>', table)[1:]:
            assert re.findall('data-column="(.*?)"', row) == heads


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
        f"{report['running'][1]['packed_perplexity']:.3f}",
        report["machine"]["name"],
        *report["limits"],
    ):
        assert words in said
