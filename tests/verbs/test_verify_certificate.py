"""A certificate says what was verified; digests and another run of both models check it, and name what was changed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import gaugekit as gk
from gaugekit.cli import main
from gaugekit.rewrite.certificate import digests, record
from gaugekit.symmetry import GaugeFix
from gaugekit.verbs.verify import DRIFT, _agrees, _basis
from helpers import contents
from tiny import add_tokenizer, bert, copy_of, gpt2

NAME = "gaugekit_verification.json"
TEXT = ["Abc defg hijk lmno.", "The quick brown fox.", "Pack my box with jugs."]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model "a", and "b", what convert makes of it."""
    folder = tmp_path_factory.mktemp("certified")
    torch.manual_seed(0)
    gpt2().save_pretrained(folder / "a")
    gk.convert(folder / "a", folder / "b", [GaugeFix()])
    return folder


@pytest.fixture
def pair(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture(scope="module")
def certified(made):
    """The same with a certificate in "b"; its report."""
    folder = made.parent / "with certificate"
    shutil.copytree(made, folder)
    report = gk.verify(folder / "a", folder / "b", certificate=folder / "b")
    return folder, report


@pytest.fixture
def checked(certified, tmp_path):
    shutil.copytree(certified[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "a", tmp_path / "b"


def change(path, name, amount=1.0):
    weights = load_file(path / "model.safetensors")
    weights[name].view(-1)[0] += amount
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def test_a_certificate_says_what_was_verified(certified):
    folder, report = certified
    proof = json.loads((folder / "b" / NAME).read_text())
    assert proof["errors"] == report.fields and proof["errors"]["layers"][1]["noise"] > 0
    assert proof["a"]["sha256"] == digests(folder / "a") and proof["b"]["sha256"] == digests(folder / "b")
    assert (proof["a"]["place"], proof["b"]["place"]) == ("../a", ".")
    assert proof["settings"] == {"dtype": "float32", "pool": None, "batch_size": 32, "text": None}
    (step,) = proof["rewrites"]
    assert step["rewrite"] == "gauge" and step["removed"]["value_output"] == 2 * 4 * 64
    assert set(proof["versions"]) == {"gaugekit", "torch", "transformers"}
    assert any(NAME in note for note in report.notes) and report["hidden_states"] == "same"


def test_a_certificate_holds_where_nothing_changed(checked, tmp_path):
    a, b = checked
    before = contents(tmp_path)
    report = gk.check_certificate(b)
    proof = json.loads((b / NAME).read_text())["errors"]
    assert report["ok"] is True and report["relative_error"] == proof["relative_error"]
    assert report["certified"] == {name: proof[name] for name in ("noise", "relative_error")}
    assert contents(tmp_path) == before and "holds" in str(report)
    a.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a: expected the original at .*found no directory there"):
        gk.check_certificate(b / NAME)
    assert gk.check_certificate(b / NAME, tmp_path / "elsewhere")["ok"]


@pytest.mark.parametrize("which", ["a", "b"])
def test_a_changed_weight_is_refused_by_name(checked, which):
    path = dict(zip("ab", checked, strict=True))[which]
    name = next(name for name in load_file(path / "model.safetensors") if name.endswith("ln_1.weight"))
    change(path, name, 2**-20)
    role = {"a": "the original", "b": "the result"}[which]
    with pytest.raises(ValueError, match=f"certificate: {name} was changed in {role}"):
        gk.check_certificate(checked[1])


def test_what_is_missing_added_or_said_otherwise_is_refused_by_name(checked):
    a, b = checked
    weights, config = load_file(a / "model.safetensors"), (a / "config.json").read_text()
    name = sorted(weights)[0]
    other = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(other, a / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"certificate: {name} is missing from the original"):
        gk.check_certificate(b)
    save_file({**weights, "more": torch.ones(1)}, a / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="certificate: more was added to the original"):
        gk.check_certificate(b)
    save_file({**weights, name: weights[name].double()}, a / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"certificate: {name} was changed in the original"):
        gk.check_certificate(b)
    save_file(weights, a / "model.safetensors", {"format": "pt"})
    (a / "config.json").write_text(
        config.replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-03')
    )
    with pytest.raises(ValueError, match=r"certificate: config.json was changed in the original"):
        gk.check_certificate(b)
    (a / "config.json").write_text(json.dumps(json.loads(config)))  # laid out otherwise, the same content
    assert gk.check_certificate(b)["ok"]


def test_files_may_be_packed_or_sharded_anew(checked, tmp_path):
    """A model is its tensors: packed, it is the same one."""
    _, b = checked
    gk.codec.pack(b, tmp_path / "packed")
    assert digests(tmp_path / "packed") == digests(b)
    report = gk.check_certificate(tmp_path / "packed")
    assert report["ok"]


def test_an_error_that_was_written_smaller_does_not_hold(checked):
    _, b = checked
    proof = json.loads((b / NAME).read_text())
    proof["errors"]["relative_error"] = 0.0
    (b / NAME).write_text(json.dumps(proof))
    report = gk.check_certificate(b)
    assert report["ok"] is False and report["certified"]["relative_error"] == 0.0 and "FAILS" in str(report)
    proof["errors"]["relative_error"], proof["errors"]["ok"] = report["relative_error"], False
    (b / NAME).write_text(json.dumps(proof))
    assert gk.check_certificate(b)["ok"] is False


def test_a_noise_that_was_written_larger_does_not_hold(checked):
    """It is no unit of its own: neither makes room for an error that was written smaller, nor holds by itself."""
    _, b = checked
    proof = json.loads((b / NAME).read_text())
    proof["errors"]["noise"] = 1.0
    for error in (proof["errors"]["relative_error"], 0.0):
        proof["errors"]["relative_error"] = error
        (b / NAME).write_text(json.dumps(proof))
        report = gk.check_certificate(b)
        assert report["ok"] is False and report["certified"]["noise"] == 1.0


def test_errors_agree_within_half_the_noise():
    assert DRIFT == 0.5
    then = {"noise": 1e-6, "relative_error": 2e-6}

    def now(error):
        return gk.Report("verify", {"noise": then["noise"], "relative_error": error})

    assert _agrees(then, now(2.49e-6)) and _agrees(then, now(1.51e-6))
    assert (
        not _agrees(then, now(2.51e-6)) and not _agrees(then, now(1.49e-6)) and not _agrees(then, now(None))
    )
    for noise, agrees in ((1.49e-6, True), (1.51e-6, False), (0.51e-6, True), (0.49e-6, False), (1.0, False)):
        claimed = {"noise": noise, "relative_error": 2e-6}
        assert _agrees(claimed, now(2e-6)) is agrees
    then = {"noise": 0.0, "relative_error": 1e-15}
    assert _agrees(then, now(9e-13)) and not _agrees(then, now(2e-12))


def test_the_text_of_then_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = bert()
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        add_tokenizer(tmp_path / name)
    options = {"text": TEXT, "dtype": "bfloat16", "pool": "mean", "batch_size": 2}
    report = gk.verify(tmp_path / "a", tmp_path / "b", certificate=tmp_path / "proof.json", **options)
    again = gk.check_certificate(tmp_path / "proof.json", text=TEXT)
    assert again["ok"] and again["dtype"] == "bfloat16" and again["output"] == report["output"]
    assert again["rows"] == 3
    for text in (None, TEXT[:2]):
        with pytest.raises(
            ValueError, match="text: expected the text that was verified with, the one of SHA-256"
        ):
            gk.check_certificate(tmp_path / "proof.json", text=text)


def test_a_turned_stream_is_said(tmp_path):
    """Logits that agree although hidden states do not: a draft model would see it."""
    from gaugekit.symmetry import STREAM_SYMMETRIES, put_stream, stream_of

    torch.manual_seed(0)
    a = gpt2(tie_word_embeddings=False)
    b = copy_of(a)
    view, group = stream_of(b), STREAM_SYMMETRIES["stream_rotation"]
    put_stream(b, group.act(view, group.random(view, torch.Generator().manual_seed(1))))
    report = gk.verify(a, b, dtype="float64")
    assert report["hidden_states"] == "turned" and report["relative_error"] < 1e-6  # b is stored in float32
    assert gk.verify(a, copy_of(a))["hidden_states"] == "same"


def test_a_wrong_result_is_not_said_to_be_turned():
    torch.manual_seed(0)
    a = gpt2()
    b = copy_of(a)
    with torch.no_grad():
        b.transformer.h[0].mlp.c_proj.weight.normal_()
        b.transformer.h[1].attn.c_proj.weight.normal_()
    report = gk.verify(a, b, dtype="float64")
    assert report["relative_error"] > 0.1 and report["hidden_states"] == "other"
    assert [_basis([0.01, error], output) for error, output in ((0.099, 0.5), (0.1, 0.099), (0.1, 0.1))] == [
        "same",
        "turned",
        "other",
    ]
    assert _basis([], 0.0) is _basis([None], 0.0) is _basis([0.2], None) is None


def test_what_convert_certified_is_checked_by_its_files(pair, tmp_path):
    a, b = pair
    report = gk.check_certificate(b, a)
    assert report["ok"] and report["certified"] is None
    with pytest.raises(
        ValueError, match=r"a: expected the original, whose place gaugekit_certificate.json does not"
    ):
        gk.check_certificate(b)
    gk.codec.pack(b, tmp_path / "packed")
    with pytest.raises(
        ValueError, match=r"model.safetensors in .*packed' is packed, and gaugekit_certificate.json"
    ):
        gk.check_certificate(tmp_path / "packed", a)
    name = next(name for name in load_file(b / "model.safetensors") if name.endswith("ln_1.weight"))
    change(b, name)
    with pytest.raises(ValueError, match=r"certificate: model.safetensors was changed in the result"):
        gk.check_certificate(b, a)


def test_a_conversion_does_not_inherit_a_certificate(checked, tmp_path):
    a, b = checked
    shutil.copy(b / NAME, a / NAME)
    gk.convert(a, tmp_path / "again", [GaugeFix()], dense=True)
    assert not (tmp_path / "again" / NAME).exists()


def test_where_no_certificate_can_be_written(pair, tmp_path):
    a, b = pair
    (tmp_path / "taken.json").write_text("mine")
    with pytest.raises(ValueError, match="certificate: expected a new file, got .*taken.json', which exists"):
        gk.verify(a, b, certificate=tmp_path / "taken.json")
    assert (tmp_path / "taken.json").read_text() == "mine"
    with pytest.raises(ValueError, match="certificate: expected a folder to write it in"):
        gk.verify(a, b, certificate=tmp_path / "nowhere" / "proof.json")
    with pytest.raises(
        ValueError, match="certificate: expected b to be a model directory, got GPT2LMHeadModel"
    ):
        gk.verify(a, gpt2(), certificate=tmp_path / "proof.json")


@pytest.mark.parametrize(
    "content, got",
    [
        ("{", "is not JSON"),
        ('{"steps": [5]}', r"expected a list of objects at steps, got \[5\]"),
        ('{"steps": 5}', "expected a list of objects at steps, got 5"),
    ],
)
def test_a_damaged_certificate_of_convert_is_refused_before_any_run(pair, tmp_path, content, got):
    a, b = pair
    (b / "gaugekit_certificate.json").write_text(content)
    told = []
    with pytest.raises(ValueError, match=f"certificate: gaugekit_certificate.json is no certificate .*{got}"):
        gk.verify(a, b, certificate=tmp_path / "proof.json", progress=lambda *now: told.append(now))
    assert not told and not (tmp_path / "proof.json").exists()


def test_what_is_not_the_original_is_not_certified(pair, tmp_path, capsys):
    a, b = pair
    change(b, "transformer.wpe.weight")
    assert main(["verify", str(a), str(b), "--certificate", str(tmp_path / "proof.json")]) == 1
    assert not (tmp_path / "proof.json").exists()
    assert "certificate: none was written, since the result is not the original" in capsys.readouterr().out


def test_a_certificate_behind_a_link_finds_its_models(certified, tmp_path):
    """A way up from a linked folder leads out of the folder it links to."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copytree(certified[0], tmp_path / "deep" / "er", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "b", target_is_directory=True)
    assert gk.check_certificate(tmp_path / "link")["ok"]
    models = {"a": tmp_path / "link" / ".." / "a", "b": tmp_path / "link"}
    proof = record(tmp_path / "link" / "other.json", models, {"text": None}, {}, [])
    assert (proof["a"]["place"], proof["b"]["place"]) == ("../a", ".")


def test_the_command_line_writes_and_checks(pair, capsys):
    a, b = map(str, pair)
    assert main(["verify", a, b, "--certificate", b]) == 0
    assert "certificate: written to" in capsys.readouterr().out
    assert main(["verify", "--certificate", b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"]["noise"] > 0
    assert main(["verify", a, "--certificate", b]) == 0
    change(pair[0], "transformer.h.0.ln_1.weight")
    capsys.readouterr()
    assert main(["verify", "--certificate", b]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "transformer.h.0.ln_1.weight was changed in the original" in err
    for arguments, message in (
        (["verify", a], "expected B, got none"),
        (["verify"], "expected A, B, got none"),
        (["verify", "--certificate", b, "--dtype", "float32"], "--dtype: expected without --certificate"),
        (
            ["verify", a, b, "--perplexity", "x", "--certificate", b],
            "--perplexity: expected without --certificate",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
