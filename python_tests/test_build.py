"""The build: what it finds, what it says when it does not, and a wheel built from an sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from wanda_ext import _build_backend as backend

ROOT = Path(__file__).resolve().parents[1]


def make_file(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_toolkit(home: Path) -> Path:
    make_file(home / "bin/nvcc")
    make_file(home / "include/cuda_runtime.h")
    return home


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDA_EXT_CUDA", "WANDA_EXT_CUDA_ARCHS", "CUTLASS_DIR", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def message(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    return str(caught.value)


# --- WANDA_EXT_CUDA and the toolkit ---------------------------------------------------------------


def test_cuda_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.cuda_mode() == "auto"
    monkeypatch.setenv("WANDA_EXT_CUDA", "yes")
    assert "'yes'; expected auto, 0, 1 or pypi" in message(backend.cuda_mode)


def test_cuda_home_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "mine")))
    assert backend.find_cuda_home("auto") == backend.find_cuda_home("1") == tmp_path / "mine"
    assert backend.find_cuda_home("0") is None


def test_nvcc_without_headers_is_no_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = make_file(tmp_path / "wrapper/bin/nvcc").parents[1]
    good = make_toolkit(tmp_path / "good")
    monkeypatch.setattr(backend, "cuda_candidates", lambda mode: [wrapper, good])
    assert backend.find_cuda_home("auto") == good


def test_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cuda_candidates", lambda mode: [tmp_path])
    assert backend.find_cuda_home("auto") is None
    required = message(backend.find_cuda_home, "1")
    assert "no CUDA toolkit was found" in required
    assert str(tmp_path) in required
    assert "Set CUDA_HOME" in required
    assert "pip install 'cuda-toolkit[nvcc" in message(backend.find_cuda_home, "pypi")


# --- Architectures --------------------------------------------------------------------------------


def test_default_archs_are_those_nvcc_knows() -> None:
    known = {"75", "80", "86", "87", "89", "90"}
    assert backend.cuda_archs(known) == ["80", "86", "89", "90+PTX"]
    newer = ["80", "86", "89", "90+PTX", "100", "120+PTX"]  # 110 runs the PTX of 90
    assert backend.cuda_archs(known | {"100", "120", "121"}) == newer
    assert "no architecture" in message(backend.cuda_archs, {"50"})


@pytest.mark.parametrize("text", ["80;90a+PTX", "8.0 9.0a+PTX", " 80,90a+PTX "])
def test_given_archs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDA_EXT_CUDA_ARCHS", text)
    assert backend.cuda_archs({"80"}) == ["80", "90a+PTX"]


@pytest.mark.parametrize("text", ["sm_80", "80;ninety", "80+ptx", "8"])
def test_bad_archs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDA_EXT_CUDA_ARCHS", text)
    assert "expected such as 80;90a;120+PTX" in message(backend.cuda_archs, {"80"})


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts one in front of PATH that prints a text where it is asked for compute capabilities."""

    def install(says: str, status: int = 0) -> None:
        asked = '[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] || exit 9'
        program = f"#!/bin/sh\n{asked}\nprintf '{says}'\nexit {status}\n"
        make_file(tmp_path / "bin/nvidia-smi", program).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("WANDA_EXT_CUDA_ARCHS", "native")
    return install


KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


@pytest.mark.parametrize(
    ("says", "archs"),
    [
        ("9.0\\n", ["90+PTX"]),
        ("8.6\\n", ["86+PTX"]),
        ("12.0\\n9.0\\n9.0\\n8.0\\n", ["80", "90", "120+PTX"]),
    ],
)
def test_native_archs(says: str, archs: list[str], nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(says)
    assert backend.cuda_archs(KNOWN) == archs


def test_native_archs_that_cannot_be(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("9.0\\n7.5\\n")
    assert "has compute capability 7.5; the kernels need 8.0" in message(backend.cuda_archs, KNOWN)
    nvidia_smi("10.3\\n")
    told = message(backend.cuda_archs, KNOWN)
    assert "of architecture 103, which this nvcc does not know" in told
    assert "set it to 120+PTX" in told


def test_native_archs_without_a_gpu(
    nvidia_smi: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for says, status in (("No devices were found\\n", 6), ("", 0), ("[N/A]\\n", 0)):
        nvidia_smi(says, status)
        told = message(backend.cuda_archs, KNOWN)
        assert "neither nvidia-smi nor torch finds a GPU" in told
        assert "such as 90, or leave it out" in told
    (tmp_path / "bin/nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither nvidia-smi nor torch" in message(backend.cuda_archs, KNOWN)


def test_native_archs_by_torch(
    nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi('Field "compute_cap" is not a valid field to query.\\n', 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_capability", [(9, 0), (8, 0), (9, 0)].__getitem__)
    assert backend.cuda_archs(KNOWN) == ["80", "90+PTX"]


def test_archs_ask_for_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cuda_candidates", lambda mode: [tmp_path])
    for archs in ("native", "80;90"):
        monkeypatch.setenv("WANDA_EXT_CUDA_ARCHS", archs)
        told = message(backend.find_cuda_home, "auto")
        assert f"WANDA_EXT_CUDA_ARCHS={archs}, but no CUDA toolkit was found" in told
        assert backend.find_cuda_home("0") is None


def test_gencode_flags() -> None:
    assert backend.gencode_flags(["80", "90a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


def test_wgmma_is_built_for_90() -> None:
    for archs in (["80", "90", "100+PTX"], ["90+PTX"], ["90a"]):
        assert backend.has_wgmma(archs, "12.2.140") and backend.has_wgmma(archs, "13.0.88")
        assert not backend.has_wgmma(archs, "12.1.105") and not backend.has_wgmma(archs, "9.2")
    assert not backend.has_wgmma(["80", "120+PTX"], "13.0.88")


@pytest.mark.parametrize("says", ["(C7510) wgmma.mma_async instructions are serialized due to", ""])
@pytest.mark.parametrize("status", [0, 3])
def test_serialised_wgmma_is_an_error(says: str, status: int, tmp_path: Path) -> None:
    lines = f"echo '{says}'", 'touch "$2"', f"exit {status}"
    compiler = make_file(tmp_path / "nvcc", "\n".join(lines))
    made = tmp_path / "an object.o"
    command = ["sh", ROOT / "csrc/core/cuda/sm90/check_ptxas.sh", "sh", compiler, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = status == 0 and says != ""
    assert done.returncode == (1 if refused else status)
    assert made.exists() is not refused
    assert says in done.stderr


# --- CUTLASS --------------------------------------------------------------------------------------


def test_cutlass_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "include/cutlass/cutlass.h"
    assert backend.find_cutlass(tmp_path) is None
    fetched = tmp_path / "build/cutlass-4.2.0/cutlass_library/source"
    make_file(fetched / header)
    assert backend.find_cutlass(tmp_path) == fetched
    make_file(tmp_path / "third_party/cutlass" / header)
    assert backend.fetch_cutlass(tmp_path) == tmp_path / "third_party/cutlass"
    make_file(tmp_path / "mine" / header)
    monkeypatch.setenv("CUTLASS_DIR", str(tmp_path / "mine"))
    assert backend.find_cutlass(tmp_path) == tmp_path / "mine"
    monkeypatch.setenv("CUTLASS_DIR", str(tmp_path / "nowhere"))
    assert "nowhere, which has no include" in message(backend.find_cutlass, tmp_path)


def test_cutlass_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.sys, "executable", shutil.which("false"))
    assert "git submodule update --init" in message(backend.fetch_cutlass, tmp_path)


# --- The torch that is installed ------------------------------------------------------------------


def install_torch(site: Path, version: str) -> Path:
    make_file(site / f"torch-{version}.dist-info/METADATA", f"Name: torch\nVersion: {version}\n")
    return site


def test_installed_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "target_site_packages", lambda: [tmp_path / "a", tmp_path / "b"])
    assert backend.installed_torch() is None
    install_torch(tmp_path / "a", "2.9.1")
    assert backend.installed_torch() is None
    install_torch(tmp_path / "b", "2.10.0+cpu")
    assert backend.installed_torch() == tmp_path / "b"


def test_target_site_packages_follows_pth_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, more = tmp_path / "site", tmp_path / "more"
    more.mkdir()
    make_file(site / "extra.pth", f"# comment\nimport sys\n{more}\n{tmp_path / 'missing'}\n\n")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda kind: str(site))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert backend.target_site_packages() == [site, more]


@pytest.mark.parametrize("torch_there", [True, False])
@pytest.mark.parametrize(
    ("mode", "more"), [("0", []), ("1", ["pip"]), ("pypi", [backend.CUDA_WHEELS, "pip"])]
)
def test_build_requirements(
    torch_there: bool, mode: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDA_EXT_CUDA", mode)
    monkeypatch.setattr(backend, "installed_torch", lambda: ROOT if torch_there else None)
    monkeypatch.setattr(backend, "find_cuda_home", lambda mode: None if mode == "0" else ROOT)
    monkeypatch.setattr(backend, "find_cutlass", lambda: None)
    expected = ([] if torch_there else ["torch>=2.10"]) + more
    assert backend.build_requirements() == expected
    assert backend.get_requires_for_build_wheel() == expected
    assert backend.get_requires_for_build_editable() == expected


def test_max_jobs() -> None:
    assert 1 <= backend.max_jobs() <= (os.cpu_count() or 1)


# --- A wheel from an sdist ------------------------------------------------------------------------


def run(*command: object, directory: Path, **settings: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env={**os.environ, **settings},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_wheel_from_sdist(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, directory=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive_of_sources:
        held = {name.partition("/")[2] for name in archive_of_sources.getnames()}
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("[a-z]*/*.md")} <= held

    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", tmp_path, sdist, directory=tmp_path, WANDA_EXT_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    package = {name for name in names if ".dist-info/" not in name}
    compiled = {name for name in package if name.endswith(".so")}
    assert len(compiled) == 1
    assert "wanda_ext/py.typed" in package
    sources = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("wanda_ext/**/*.py")}
    assert package - compiled - {"wanda_ext/py.typed", "wanda_ext/packed/dispatch.json"} == sources

    program = """
import torch, wanda_ext
assert wanda_ext.__file__.startswith({site!r}), wanda_ext.__file__
weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
wanda_ext.ops.prune_nm_(weight, None, 2, 4)
print(weight.tolist(), wanda_ext.build_info()["compiled"]["cuda"])
"""
    code = program.format(site=str(tmp_path / "site"))
    printed = run(sys.executable, "-c", code, directory=tmp_path / "site")
    assert printed.splitlines()[-1] == "[[0.0, -4.0, 3.0, 0.0]] False"
