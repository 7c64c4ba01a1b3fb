"""A file that is no certificate, or a damaged one, is refused in one sentence before anything is run."""

import json

import pytest

import gaugekit as gk


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"gaugekit_verification": 2}', '{"gaugekit_verification": 1}', "\xff", "[" * 100_000,
     '{"gaugekit_verification": 1e999, "a": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_what_is_no_certificate_is_refused(tmp_path, content):
    (tmp_path / "proof.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        ValueError, match="certificate: proof.json (is no certificate of gaugekit's|has format 2, not 1)"
    ):
        gk.check_certificate(tmp_path / "proof.json")
    with pytest.raises(
        ValueError, match="certificate: expected a file, or a directory with gaugekit_verification.json"
    ):
        gk.check_certificate(tmp_path)


SOUND = {
    "gaugekit_verification": 1,
    "a": {"place": "a", "sha256": {}},
    "b": {"place": "b", "sha256": {}},
    "settings": {"dtype": "float32", "pool": None, "batch_size": 32, "text": None},
    "errors": {"ok": True, "noise": 1e-7, "relative_error": 1e-7},
}


@pytest.mark.parametrize(
    "way, value, got",
    [
        ("settings.text", 5, "null or a SHA-256 sum at settings.text, got 5"),
        ("settings.batch_size", True, "a positive whole number at settings.batch_size, got true"),
        ("settings.batch_size", "32", 'a positive whole number at settings.batch_size, got "32"'),
        ("settings.dtype", None, "a string at settings.dtype, got null"),
        ("settings.pool", ["mean"], 'null or a string at settings.pool, got ["mean"]'),
        ("settings", [], "a string at settings.dtype, got none"),
        ("errors.noise", "abc", 'null or a finite number at errors.noise, got "abc"'),
        ("errors.noise", [1], "null or a finite number at errors.noise, got [1]"),
        ("errors.relative_error", float("nan"), "null or a finite number at errors.relative_error, got NaN"),
        ("errors.relative_error", 10**400, "a finite number at errors.relative_error, got a number of many"),
        ("errors.ok", 1, "true or false at errors.ok, got 1"),
        ("a.place", "x" * 5000, "a path at a.place, got a long string"),
        ("b.place", 7, "a path at b.place, got 7"),
        ("a.sha256", "abc", 'an object of SHA-256 sums at a.sha256, got "abc"'),
        ("b.sha256", {"x": 5}, 'an object of SHA-256 sums at b.sha256, got {"x": 5}'),
        ("b", None, "an object of SHA-256 sums at b.sha256, got none"),
    ],
)
def test_entries_of_odd_types_are_refused_by_name(tmp_path, way, value, got):
    content = json.loads(json.dumps(SOUND))
    *parents, last = way.split(".")
    entry = content
    for name in parents:
        entry = entry[name]
    entry[last] = value
    (tmp_path / "proof.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as refusal:
        gk.check_certificate(tmp_path / "proof.json")
    told = str(refusal.value)
    assert told.startswith("certificate: proof.json is no certificate of gaugekit's: ") and got in told
    assert len(told) < 300


def test_other_damage_is_refused_as_well(tmp_path):
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(SOUND))
    with pytest.raises(
        ValueError, match="a: expected the original at"
    ):  # sound, of models that are not there
        gk.check_certificate(path)
    path.write_text(json.dumps(SOUND).replace("32", "3" * 5000))
    with pytest.raises(
        ValueError, match="certificate: proof.json is no certificate of gaugekit's: .*not JSON"
    ):
        gk.check_certificate(path)
    path.write_text(json.dumps({"source_sha256": {}, "output_sha256": "abc"}))
    with pytest.raises(ValueError, match="expected an object of SHA-256 sums at output_sha256, got .abc."):
        gk.check_certificate(path)
    path.write_text(json.dumps({**SOUND, "a": {"place": "x" * 4000, "sha256": {}}}))
    with pytest.raises(ValueError, match="a: expected the original at .*found no directory there"):
        gk.check_certificate(path)
    with pytest.raises(ValueError, match="certificate: expected a file, or a directory with"):
        gk.check_certificate("x" * 5000)
