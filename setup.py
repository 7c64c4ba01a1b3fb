"""Builds gaugekit's binaries where it can, and says in ``_build.json`` why where it cannot.

Those of the operators (``cpu``, ``cuda``) use PyTorch's stable ABI: one file serves every torch from 2.11 on. That of
packed files (``codec``) needs neither torch nor Python. A machine without a C++ compiler gets the pure Python package,
an install in an isolated build environment (where torch is not visible) ``codec`` alone: every operator then answers
through its composition of torch operators, slower and equally right. Nothing is downloaded, no GPU is
probed. A binary that lies beside the sources already, built from them and by this file, is taken as it is.

Environment: GAUGEKIT_CUDA_ARCHS (default "80;90a") names the architectures of the CUDA binary; set, it has that binary
built beside a torch without CUDA too, which is otherwise spared, since such a torch never loads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "python" / "gaugekit"
STABLE_ABI_TORCH_2_11 = "0x020b000000000000"
DEFINES = [("TORCH_TARGET_VERSION", STABLE_ABI_TORCH_2_11)]
# -Wno-psabi: vectors wider than the baseline's registers go to inlined functions only, so GCC's note is moot.
FLAGS = ["-O3", "-std=c++17", "-pthread", "-fvisibility=hidden", "-g0", "-ffp-contract=off", "-Wno-psabi"]
LINK_FLAGS = ["-pthread", "-Wl,-s"] if sys.platform.startswith("linux") else []

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

    TORCH_MISSING = ""
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = None
    TORCH_MISSING = (
        f"torch cannot be imported while building ({error}); "
        "install torch first, then: pip install --no-build-isolation ."
    )


def digest_of_sources() -> str:
    """SHA-256 over csrc; a checkout whose sources have moved on does not load the binary of the old ones."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def digest_of_recipe() -> str:
    """SHA-256 over what else decides about a binary: this file, torch's version, compiler, architectures."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    settings = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CFLAGS", "GAUGEKIT_CUDA_ARCHS")]
    digest.update(repr(["" if TORCH_MISSING else torch.__version__, *settings]).encode())
    return digest.hexdigest()


def built_before() -> set[str]:
    """The names of the binaries in the source folder that were built from these sources by this recipe."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return set()
    if (record.get("sources"), record.get("recipe")) != (digest_of_sources(), digest_of_recipe()):
        return set()
    return {name for name in STATUS if record[name]["built"]}


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_library_directory(nvcc: str) -> str:
    """The folder of libcudart_static, as nvcc itself names it: nvcc may be a link from outside the toolkit."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME",) if name in os.environ]
    roots += [
        Path(line.split("TOP=", 1)[1].strip().strip('"')).resolve()
        for line in dry.stderr.splitlines()
        if "TOP=" in line
    ]
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (root / folder / "libcudart_static.a").exists():
                return str(root / folder)
    raise FileNotFoundError("libcudart_static.a stands in none of " + ", ".join(map(str, roots)))


def compiled(kind: type, name: str, **more):
    """The extension ``_<name>`` of all C++ files in csrc/<name>."""
    return kind(
        f"gaugekit._{name}",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / name).glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*/*.h")),
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
        **more,
    )


def plan_extensions() -> tuple[list, dict]:
    """The extensions to build, and for each binary that will not be built the reason and its remedy."""
    status = {
        "cpu": {"built": False, "why": "", "remedy": ""},
        "cuda": {"built": False, "why": "", "remedy": ""},
        "codec": {"built": False, "why": "", "remedy": ""},
    }
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps ."
    compiler = next(
        (c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c.split()[0])),
        None,
    )
    if compiler is None:
        for entry in status.values():
            entry.update(
                why="no C++ compiler (c++, g++ or clang++) was on PATH when gaugekit was installed",
                remedy=f"install g++ (Debian, Ubuntu: apt install g++), then {rebuild}",
            )
        return [], status

    extensions = [compiled(Extension, "codec")]
    if TORCH_MISSING:
        for name in ("cpu", "cuda"):
            status[name].update(why=TORCH_MISSING, remedy=f"pip install torch, then {rebuild}")
        return extensions, status
    extensions.append(compiled(CppExtension, "cpu", define_macros=DEFINES))
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = find_nvcc()
    if not kernels:
        status["cuda"].update(why="this version has no CUDA source files", remedy="nothing to do")
    elif nvcc is None:
        status["cuda"].update(
            why="no nvcc was found in CUDA_HOME, on PATH or in /usr/local/cuda",
            remedy=f"install the CUDA toolkit, then {rebuild}",
        )
    elif torch.version.cuda is None and "GAUGEKIT_CUDA_ARCHS" not in os.environ:
        status["cuda"].update(
            why="the torch it was built beside has no CUDA",
            remedy=f"on a machine with a GPU, install torch's CUDA build, then {rebuild}",
        )
    else:
        cuda = CppExtension("gaugekit._cuda", [], py_limited_api=True)
        cuda.kernels, cuda.nvcc, cuda.cxx = kernels, nvcc, compiler
        extensions.append(cuda)
    return extensions, status


class BuildBinaries(BuildExtension):
    """Builds each binary alone (one that fails is reported and left out) and writes ``_build.json`` in every case."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:  # torch's own check of the compiler, before any extension
            for extension in self.extensions:
                extension.optional = True
                self.failed(extension, error)

    def build_extension(self, extension):
        extension.optional = True
        try:
            target = Path(self.get_ext_fullpath(extension.name))
            before = PACKAGE / target.name
            if extension.name.rsplit("_", 1)[1] in BUILT_BEFORE and before.exists():
                if target != before:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(before, target)
            elif hasattr(extension, "kernels"):
                print(
                    f"gaugekit: compiling {len(extension.kernels)} CUDA files, a minute or two each",
                    flush=True,
                )
                self.link_cuda(extension, [self.compile_cuda(k, extension.nvcc) for k in extension.kernels])
            else:
                count = len(extension.sources)
                time = "half a minute" if count == 1 else "two to four minutes on two cores"
                print(f"gaugekit: compiling {count} C++ file{'s'[: count - 1]}, {time}", flush=True)
                super().build_extension(extension)
            STATUS[extension.name.rsplit("_", 1)[1]]["built"] = True
        except Exception as error:
            self.failed(extension, error)

    def failed(self, extension, error: Exception) -> None:
        """Writes down why this binary is missing, keeping the first reason."""
        entry = STATUS[extension.name.rsplit("_", 1)[1]]
        if not entry["built"] and not entry["why"]:
            entry["why"] = f"the build failed: {(str(error).strip().splitlines() or [repr(error)])[-1]}"
            entry["remedy"] = "read the compiler's message with: pip install --no-build-isolation -v ."

    def compile_cuda(self, source: Path, nvcc: str) -> str:
        target = Path(self.build_temp) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("GAUGEKIT_CUDA_ARCHS", "80;90a")
        inputs = [source, ROOT / "setup.py", *(ROOT / "csrc").glob("*/*.h"), *(ROOT / "csrc").glob("*/*.cuh")]
        made_for = target.with_suffix(".archs")
        same = target.exists() and made_for.exists() and made_for.read_text() == archs
        if same and all(path.stat().st_mtime < target.stat().st_mtime for path in inputs):
            return str(target)
        command = [nvcc, "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
        for arch in archs.split(";"):
            command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        command += ["--threads=0", *(f"-D{name}={value}" for name, value in DEFINES)]
        command += [f"-I{path}" for path in [str(ROOT / "csrc"), *include_paths()]]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        made_for.write_text(archs)
        return str(target)

    def link_cuda(self, extension, objects: list[str]) -> None:
        """A shared library of nvcc's objects that names torch's libraries as its own needs.

        torch is loaded with its symbols hidden from everyone who does not name it, and a linker told to leave out what
        is not needed (Ubuntu's default) finds that CUDA's part of torch, which ``libtorch`` brings in, is not: hence
        ``--no-as-needed``. At run time the names are met by the torch that is loaded already, wherever it stands.
        """
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*extension.cxx.split(), "-shared", "-o", str(target), *objects, *LINK_FLAGS]
        command += [
            f"-L{cuda_library_directory(extension.nvcc)}",
            "-lcudart_static",
            "-lrt",
            "-ldl",
            "-lpthread",
        ]
        command += ["-Wl,--no-as-needed", *(f"-L{folder}" for folder in library_paths())]
        command += ["-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)

    def run(self):
        super().run()
        package = PACKAGE if self.inplace else Path(self.build_lib) / "gaugekit"
        package.mkdir(parents=True, exist_ok=True)
        built_for = "" if TORCH_MISSING else torch.__version__
        (package / "_build.json").write_text(
            json.dumps(
                {
                    "torch": built_for,
                    "python": sys.version.split()[0],
                    "sources": digest_of_sources(),
                    "recipe": digest_of_recipe(),
                    **STATUS,
                },
                indent=1,
            )
            + "\n"
        )
        for name, entry in STATUS.items():
            if not entry["built"] and entry["remedy"] != "nothing to do":
                print(
                    f"gaugekit: {name} binary not built: {entry['why']}. {entry['remedy']}", file=sys.stderr
                )


EXTENSIONS, STATUS = plan_extensions()
BUILT_BEFORE = built_before()


class BinaryDistribution(Distribution):
    """Runs build_ext even when there is nothing to compile, so that the reason is written down."""

    def has_ext_modules(self):
        return True


setup(
    packages=find_packages("python"),
    distclass=BinaryDistribution,
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildBinaries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
