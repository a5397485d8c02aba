"""Builds, where there is no GPU, all that gpu_check.py runs where there is one: a folder to carry.

It holds the wheel of one CPython and what is in it (site/), the C++ programs (programs/), the
Python benchmarks and tests as they are (benchmarks/, python_tests/), and prepared.json, which says
from which commit and for what.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 30 << 20
PROGRAMS = ("linear_24", "linear_bitmap", "pruning")
CARRIED = ("benchmarks/*.py", "python_tests/**/*.py", "pyproject.toml")


class PrepareError(Exception):
    """What is missing, and what to do."""


def prepare(python: str, archs: str, out: Path, build: Path | None = None) -> dict[str, Any]:
    """Makes the folder `out`, which must not hold anything; what prepared.json says.

    python: a version such as "3.12", or an interpreter's path. archs: as WANDA_EXT_CUDA_ARCHS takes
    them. build: where CMake builds the programs, kept for the next time; default a folder that is
    removed. Raises PrepareError.
    """
    if out.exists() and any(out.iterdir()):
        raise PrepareError(f"{out} is not empty; name another folder, or remove it")
    interpreter = find_python(python)
    cmake = shutil.which("cmake")
    if cmake is None:
        raise PrepareError("cmake is not found; `pip install cmake ninja`")
    environ, built_from = toolchain(archs), commit()  # before the sources change meanwhile
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = build_wheel(interpreter, out, Path(scratch), environ)
            cmake_build = build or Path(scratch) / "cmake"
            build_programs(cmake, archs, out / "programs", cmake_build, environ)
        return fill(out, wheel, interpreter, archs, built_from)
    except BaseException:
        shutil.rmtree(out)  # a part of it is of no use, and would be in the way
        raise


def fill(out: Path, wheel: Path, interpreter: str, archs: str, built_from: str) -> dict[str, Any]:
    """All but the wheel and the programs, which are there; what prepared.json says."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    for pattern in CARRIED:
        for path in ROOT.glob(pattern):
            target = out / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    # Here, so that a run writes nothing into the folder; by hash, for times change when it travels.
    run(interpreter, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", str(out))
    about = {
        "commit": built_from,
        "python": ask(interpreter, "'%d.%d' % sys.version_info[:2]"),
        "machine": platform.machine(),
        "archs": archs,
        "wheel": wheel.name,
    }
    (out / "prepared.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise PrepareError(
            f"the folder holds {size >> 20} MiB, over {MOST_BYTES >> 20}; ask for fewer archs"
        )
    return {**about, "bytes": size}


def toolchain(archs: str) -> dict[str, str]:
    """The environment of both builds: which nvcc, which CUTLASS, which architectures."""
    path = ROOT / "wanda_ext/_build_backend.py"
    spec = util.spec_from_file_location("_build_backend", path)
    assert spec is not None and spec.loader is not None
    backend = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(backend)
        home = backend.find_cuda_home("1")
        cutlass = backend.fetch_cutlass()
    except ImportError as error:
        raise PrepareError(f"{error}; `pip install setuptools`") from error
    except SystemExit as error:  # it says what is missing
        raise PrepareError(str(error)) from error
    chosen = {"CUDA_HOME": str(home), "CUDACXX": str(home / "bin/nvcc")}
    chosen |= {"CUTLASS_DIR": str(cutlass), "WANDA_EXT_CUDA": "1", "WANDA_EXT_CUDA_ARCHS": archs}
    return {**os.environ, **chosen}


def find_python(wanted: str) -> str:
    """The interpreter of this version, or at this path."""
    if os.sep in wanted:
        if not os.access(wanted, os.X_OK):
            raise PrepareError(f"{wanted} is not an interpreter")
        return str(Path(wanted).absolute())
    if not re.fullmatch(r"3\.\d+", wanted):
        raise PrepareError(f"--python {wanted}: expected such as 3.12, or an interpreter's path")
    if wanted == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(pyenv.glob(f"{wanted}.*/bin/python"), key=_patch_level)
    found = [str(path) for path in installed[-1:]] or [shutil.which(f"python{wanted}") or ""]
    if not found[0]:
        raise PrepareError(f"CPython {wanted} is not found, neither on PATH nor in {pyenv}")
    return found[0]


def _patch_level(python: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", python.parents[1].name)))


def build_wheel(interpreter: str, out: Path, scratch: Path, environ: dict[str, str]) -> Path:
    """Built against the torch that this interpreter has; where it has none pip fetches one to build
    with, which PIP_CONSTRAINT and PIP_BUILD_CONSTRAINT may choose."""
    source = scratch / "source"  # a build leaves traces, and would find those of others
    copy_tracked(source)
    pip = [interpreter, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
    run(*pip, environ=environ)
    (wheel,) = out.glob("wanda_ext-*.whl")
    return wheel


def build_programs(cmake: str, archs: str, out: Path, build: Path, environ: dict[str, str]) -> None:
    """The C++ benchmarks."""
    numbers = [arch.removesuffix("+PTX") for arch in re.split(r"[;,\s]+", archs)]
    wgmma = "ON" if {"90", "90a"} & set(numbers) else "OFF"
    real = ";".join(f"{number.removesuffix('a')}-real" for number in numbers)
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DWANDA_EXT_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={real}", f"-DWANDA_EXT_SM90A={wgmma}"]
    if not (build / "CMakeCache.txt").exists() and shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    run(*configure, environ=environ)
    jobs = environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    run(cmake, "--build", str(build), "--target", "benchmarks", "--parallel", jobs, environ=environ)
    out.mkdir()
    for name in PROGRAMS:
        shutil.copy2(build / "benchmarks/cpp" / name, out / name)


def copy_tracked(target: Path) -> None:
    """The sources, without what builds left among them."""
    listed = run("git", "-C", str(ROOT), "ls-files", "-z").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def commit() -> str:
    """Of the sources, with "-dirty" where they were changed since."""
    return run("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12").strip()


def ask(interpreter: str, expression: str) -> str:
    return run(interpreter, "-c", f"import sys; print({expression})").strip()


def run(*command: str, environ: dict[str, str] | None = None) -> str:
    """What it prints. Raises PrepareError with the end of what it said."""
    done = subprocess.run(
        command,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = [line for line in lines[:-15] if re.search(r"\berror\b|FAILED", line)]
        said = "\n".join([*errors[:10], *lines[-15:]])
        raise PrepareError(f"{' '.join(command)} ended with status {done.returncode}:\n{said}")
    return done.stdout
