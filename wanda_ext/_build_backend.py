"""The build backend: setuptools, reusing the torch that is installed, and the look-ups of setup.py.

pip builds in an isolated environment. A plain `requires = ["torch"]` would download a second torch
of several gigabytes there; this backend asks for one only where the target environment has none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path
from typing import Any

from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)
CUTLASS_VERSION = "4.2.0"
CUTLASS_WHEEL = "nvidia-cutlass==4.2.0.0"  # its headers are those of tag v4.2.0, byte for byte
CUDA_WHEELS = "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]==13.0.*"
PORTABLE_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_CAPABILITY = (8, 0)
NATIVE = "native"  # of WANDA_EXT_CUDA_ARCHS: the GPUs that are here


class BuildError(SystemExit):
    """Ends the build with a message and no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"wanda_ext: {message}")


# --- What the environment offers -----------------------------------------------------------------


def cuda_mode() -> str:
    """WANDA_EXT_CUDA: auto (where a toolkit is), 0 (never), 1 (must), pypi (nvcc from PyPI)."""
    mode = os.environ.get("WANDA_EXT_CUDA", "auto")
    if mode not in ("auto", "0", "1", "pypi"):
        raise BuildError(f"WANDA_EXT_CUDA is {mode!r}; expected auto, 0, 1 or pypi")
    return mode


def cuda_candidates(mode: str) -> list[Path]:
    """Where a toolkit may be, best first."""
    places = []
    if mode != "pypi":
        places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        # Last, because an nvcc on PATH may be a wrapper script that lies outside its toolkit.
        nvcc = shutil.which("nvcc")
        places += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    nvidia = util.find_spec("nvidia")  # where the wheels of CUDA_WHEELS unpack
    parents = nvidia.submodule_search_locations if nvidia else None
    return [Path(place) for place in places if place] + [Path(p) / "cu13" for p in parents or ()]


def find_cuda_home(mode: str) -> Path | None:
    """The toolkit's directory: one that holds bin/nvcc and include/cuda_runtime.h."""
    candidates = [] if mode == "0" else cuda_candidates(mode)
    for home in candidates:
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    if mode == "1":
        raise BuildError(
            "WANDA_EXT_CUDA=1, but no CUDA toolkit was found (bin/nvcc and include/cuda_runtime.h "
            f"in one of: {', '.join(map(str, candidates))}). Set CUDA_HOME, or WANDA_EXT_CUDA=pypi "
            "to fetch nvcc from PyPI, or WANDA_EXT_CUDA=0 to build for the CPU"
        )
    if mode == "auto" and (archs := os.environ.get("WANDA_EXT_CUDA_ARCHS", "").strip()):
        raise BuildError(
            f"WANDA_EXT_CUDA_ARCHS={archs}, but no CUDA toolkit was found to compile for it. Set "
            "CUDA_HOME, or WANDA_EXT_CUDA=pypi to fetch nvcc from PyPI, or WANDA_EXT_CUDA=0 to "
            "build for the CPU"
        )
    if mode == "pypi":
        raise BuildError(
            "WANDA_EXT_CUDA=pypi, but nvcc is not installed here. Without build isolation, run "
            f"`pip install '{CUDA_WHEELS}'` first"
        )
    return None


def find_cutlass(root: Path = ROOT) -> Path | None:
    """CUTLASS_DIR, else the submodule, else headers fetched earlier; None where there are none."""
    given = os.environ.get("CUTLASS_DIR")
    fetched = root / "build" / f"cutlass-{CUTLASS_VERSION}" / "cutlass_library" / "source"
    for source in [Path(given)] if given else [root / "third_party" / "cutlass", fetched]:
        if (source / "include/cutlass/cutlass.h").is_file():
            return source
    if given:
        raise BuildError(f"CUTLASS_DIR is {given}, which has no include/cutlass/cutlass.h")
    return None


def fetch_cutlass(root: Path = ROOT) -> Path:
    """find_cutlass, or the wheel's headers, without the wheel's many dependencies."""
    if (source := find_cutlass(root)) is not None:
        return source
    target = root / "build" / f"cutlass-{CUTLASS_VERSION}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", str(target), CUTLASS_WHEEL], check=False)
    if done.returncode != 0 or (source := find_cutlass(root)) is None:
        raise BuildError(
            "CUTLASS is missing: third_party/cutlass is empty and its wheel could not be fetched. "
            "Run `git submodule update --init`, or set CUTLASS_DIR to a checkout of "
            f"v{CUTLASS_VERSION}, or WANDA_EXT_CUDA=0 to build for the CPU"
        )
    return source


def cuda_archs(known: set[str]) -> list[str]:
    """WANDA_EXT_CUDA_ARCHS, such as "80;90a+PTX" or "native"; by default what nvcc knows of
    PORTABLE_ARCHS."""
    given = os.environ.get("WANDA_EXT_CUDA_ARCHS", "").strip()
    if given == NATIVE:
        return native_archs(known)
    archs = re.split(r"[;,\s]+", given.replace(".", "")) if given else []
    if not archs:
        archs = [arch for arch in PORTABLE_ARCHS if arch in known]
        if not archs:
            raise BuildError("this nvcc knows no architecture of " + ", ".join(PORTABLE_ARCHS))
        # The driver compiles PTX for devices that have no machine code here: for those newer than
        # the list, and that of 90 for those between its entries, such as 110.
        archs = [a + "+PTX" if a in ("90", archs[-1]) else a for a in archs]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise BuildError(
                f"WANDA_EXT_CUDA_ARCHS has {arch!r}; expected such as 80;90a;120+PTX, or {NATIVE}"
            )
    return archs


def native_archs(known: set[str]) -> list[str]:
    """Those of the GPUs that are here, and PTX of the newest."""
    capabilities = gpu_capabilities()
    if not capabilities:
        raise BuildError(
            f"WANDA_EXT_CUDA_ARCHS={NATIVE}, but neither nvidia-smi nor torch finds a GPU here: "
            "set it to the compute capability of the GPU to build for, such as 90, or leave it out "
            "to build for all"
        )
    archs = [f"{major}{minor}" for major, minor in capabilities]
    for capability, arch in zip(capabilities, archs, strict=True):
        if capability < OLDEST_CAPABILITY:
            raise BuildError(
                f"WANDA_EXT_CUDA_ARCHS={NATIVE}, and a GPU here has compute capability "
                f"{capability[0]}.{capability[1]}; the kernels need 8.0 or newer. Name the others, "
                "such as 80;90, or set WANDA_EXT_CUDA=0 to build for the CPU"
            )
        if arch not in known:
            newest = max(known, key=int)
            raise BuildError(
                f"WANDA_EXT_CUDA_ARCHS={NATIVE}, and a GPU here is of architecture {arch}, which "
                "this nvcc does not know: install a newer CUDA toolkit, or set it to "
                f"{newest}+PTX, which the driver compiles for newer GPUs"
            )
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def gpu_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs here, each once, the oldest first: (9, 0) is 9.0.

    By nvidia-smi, which sees them all; where it is missing or too old to tell, by torch.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        told = re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)
    except (OSError, subprocess.TimeoutExpired):
        told = []
    found = {(int(major), int(minor)) for major, minor in told}
    if not found and util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            found = {torch.cuda.get_device_capability(index) for index in range(count)}
    return sorted(found)


def gencode_flags(archs: list[str]) -> list[str]:
    """nvcc's flags: machine code for every architecture, PTX too for those marked +PTX."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def has_wgmma(archs: list[str], nvcc: str) -> bool:
    """Whether wanda_ext._C_sm90a is built: for 90, by an nvcc that knows sparse wgmma (12.2)."""
    too_old = re.match(r"(\d|1[01])\.|12\.[01]\.", nvcc)
    return not too_old and any(arch.removesuffix("+PTX") in ("90", "90a") for arch in archs)


def known_archs(cuda_home: Path) -> set[str]:
    """The architectures this nvcc compiles for, such as {"80", "90"}."""
    command = [str(cuda_home / "bin/nvcc"), "--list-gpu-arch"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"compute_(\d+)", listing))


def nvcc_version(cuda_home: Path) -> str:
    """Such as "13.0.88"."""
    command = [str(cuda_home / "bin/nvcc"), "--version"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def max_jobs() -> int:
    """As many compilers as cores, and as fit the memory: CUTLASS takes up to 5.4 GB each."""
    cores = len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores, int(memory_gb / 6)))


# --- The torch that is installed -----------------------------------------------------------------


def target_site_packages() -> list[Path]:
    """site-packages of the interpreter being installed into, which pip's isolation only hides."""
    found = [Path(sysconfig.get_path(kind)) for kind in ("platlib", "purelib")]
    if venv := os.environ.get("VIRTUAL_ENV"):  # uv builds in an environment of its own
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found += [Path(venv) / lib / version / "site-packages" for lib in ("lib", "lib64")]
    for site in list(found):
        for pth in sorted(site.glob("*.pth")) if site.is_dir() else ():
            for line in pth.read_text(errors="ignore").splitlines():
                found += [] if line.startswith(("#", "import")) else [site / line.strip()]
    return [site for site in dict.fromkeys(found) if site.is_dir()]


def installed_torch() -> Path | None:
    """The site-packages that hold a torch new enough to build against."""
    for site in target_site_packages():
        for torch in metadata.distributions(name="torch", path=[str(site)]):
            if tuple(map(int, torch.version.split(".")[:2])) >= OLDEST_TORCH:
                return site
    return None


def build_requirements() -> list[str]:
    """What this build needs beside pyproject.toml's `requires`."""
    mode = cuda_mode()
    needed = [] if installed_torch() else ["torch>={}.{}".format(*OLDEST_TORCH)]
    if mode == "pypi":
        needed.append(CUDA_WHEELS)
    if mode == "pypi" or find_cuda_home(mode):
        needed += [] if find_cutlass() else ["pip"]  # to fetch it with; isolation hides the other
    return needed


def show_installed_torch() -> None:
    """Lets this process import the target's torch; build tools still come from isolation."""
    if util.find_spec("torch") is None and (site := installed_torch()):
        sys.path.append(str(site))


# --- PEP 517 and PEP 660 -------------------------------------------------------------------------

Settings = dict[str, Any] | None

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_requirements()


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    show_installed_torch()
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    show_installed_torch()
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return name
