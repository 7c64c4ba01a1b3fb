"""``gaugekit pack`` and ``unpack`` never import torch, in what way they may be called, and give the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gaugekit as gk
from gaugekit.codec.files.chain import save_chain

PACKAGE = Path(gk.__file__).parent
SCRIPT = "import sys\nfrom gaugekit.cli import main\nsys.exit(main())\n"  # as installers write it
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory like a model's, of dtypes that are coded and others, one file with more names than weights."""
    folder = tmp_path_factory.mktemp("source") / "m"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(700, 500, generator=generator) * 0.02
    types = {"a": torch.bfloat16, "b": torch.float16, "c": torch.float32, "d": torch.float8_e4m3fn}
    save_file({name: weight.to(dtype) for name, dtype in types.items()}, folder / "one.safetensors")
    many = {f"layer.{i}.bias": torch.randn(4, generator=generator) for i in range(300)}
    save_file({"ids": torch.arange(1000), **many}, folder / "two.safetensors", {"format": "pt"})
    where = {**dict.fromkeys(types, "one.safetensors"), **dict.fromkeys(many, "two.safetensors")}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """What the function of the same name, in a process with torch, makes of it."""
    target = tmp_path_factory.mktemp("packed") / "p"
    gk.codec.pack(source, target)
    return target


@pytest.fixture(params=["script", "module"])
def run(request, tmp_path):
    """The command line in a process where torch cannot be imported."""
    forbidden = tmp_path / "forbidden" / "torch"
    forbidden.mkdir(parents=True)
    (forbidden / "__init__.py").write_text("raise ImportError('torch was imported')\n")
    script = tmp_path / "bin" / "gaugekit"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    begin = [sys.executable, *([str(script)] if request.param == "script" else ["-m", "gaugekit"])]

    def call(*arguments, package=PACKAGE, **environment):
        path = os.pathsep.join(map(str, (forbidden.parent, package.parent)))
        return subprocess.run(
            [*begin, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )

    return call


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_both_do_without_torch_and_give_the_same_bytes(run, source, packed, tmp_path):
    done = run("pack", source, tmp_path / "p", "--verify", "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    report = json.loads(done.stdout)
    expected = gk.codec.pack(source, tmp_path / "q", verify=True).fields
    assert list(report) == list(expected)
    assert {**report, "seconds": 0} == {**expected, "seconds": 0}
    assert contents(tmp_path / "p") == contents(packed)
    done = run("unpack", packed, tmp_path / "u")
    assert done.returncode == 0 and "Restored" in done.stdout, done.stderr
    assert contents(tmp_path / "u") == contents(source)


@pytest.mark.parametrize("symbols", ["high-byte", "exponent-and-mantissa"])
def test_one_file_with_other_symbols(run, source, tmp_path, symbols):
    done = run("pack", source / "one.safetensors", tmp_path / "p.safetensors", "--symbols", symbols)
    assert done.returncode == 0, done.stderr
    gk.codec.pack(source / "one.safetensors", tmp_path / "q.safetensors", symbols=symbols)
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_what_save_file_writes_is_what_pack_makes_of_it(run, tmp_path):
    tensors = {"w": (torch.randn(3000, 100) * 0.02).bfloat16(), "i": torch.arange(7)}
    gk.codec.save_file(tensors, tmp_path / "direct.safetensors")
    done = run("unpack", tmp_path / "direct.safetensors", tmp_path / "plain.safetensors")
    assert done.returncode == 0, done.stderr
    done = run("pack", tmp_path / "plain.safetensors", tmp_path / "again.safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "direct.safetensors").read_bytes()


def test_damage_and_bad_usage_are_said_as_ever(run, packed, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray((packed / "one.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(gk.codec.CorruptFile) as error:
        gk.codec.unpack(damaged, tmp_path / "x")
    done = run("unpack", damaged, tmp_path / "x")
    assert (done.returncode, done.stderr) == (2, f"gaugekit unpack: {error.value}\n")
    done = run("pack", tmp_path / "nothing", tmp_path / "x")
    assert done.returncode == 2 and "does not exist" in done.stderr
    done = run("pack", "--memroy", "1", "a", "b")
    assert done.returncode == 2 and "see gaugekit pack --help" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "damaged.safetensors", "forbidden"]


@pytest.fixture
def bare(tmp_path):
    """The package as it is where nothing could be compiled."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "bench", "triton_kernels")
    return Path(shutil.copytree(PACKAGE, tmp_path / "bare" / "gaugekit", ignore=ignored))


def test_without_the_binary_numpy_gives_the_same_bytes_after_one_warning(run, bare, source, packed, tmp_path):
    done = run("pack", source, tmp_path / "p", "--verify", package=bare)
    assert done.returncode == 0 and done.stderr.count("RuntimeWarning") == 1, done.stderr
    assert "runs without its C++ binary" in done.stderr and "pip install" in done.stderr
    assert contents(tmp_path / "p") == contents(packed)
    done = run("unpack", packed, tmp_path / "u", package=bare)
    assert done.returncode == 0 and done.stderr.count("RuntimeWarning") == 1, done.stderr
    assert contents(tmp_path / "u") == contents(source)


@pytest.mark.parametrize(("name", "said"), [("codec", "asks for codec"), ("gpu", "names among cpu, cuda")])
def test_a_required_binary_that_is_missing_is_an_error(run, bare, source, tmp_path, name, said):
    done = run("pack", source, tmp_path / "p", package=bare, GAUGEKIT_REQUIRE=name)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "p").exists()


def test_a_chained_file_imports_what_it_needs(tmp_path):
    """Its rotations are torch's work: the command line begins without torch, and the operators are there in time."""
    tensors = {"w": torch.randn(20, 30).half(), "b": torch.arange(9.0)}
    save_chain(tmp_path / "c.safetensors", [], tensors, [])
    command = [
        sys.executable,
        "-m",
        "gaugekit",
        "unpack",
        tmp_path / "c.safetensors",
        tmp_path / "u.safetensors",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = gk.codec.load_file(tmp_path / "u.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["gaugekit", "other"])
def test_who_imports_gaugekit_has_its_operators(tmp_path, name):
    """A program of another name with the same arguments; and one of ours that asks for what needs them."""
    use = (
        "torch.ops.gaugekit.rans_open" if name == "other" else "gaugekit.shaped_attention, gaugekit.ops.rans"
    )
    program = tmp_path / name
    program.write_text(
        f"import gaugekit, sys\nassert ('torch' in sys.modules) == {name == 'other'}\nimport torch\n{use}\n"
    )
    done = subprocess.run([sys.executable, program, "pack", "a", "b"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
