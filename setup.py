"""Builds wanda_ext._C and, for GPUs of compute capability 9.0, wanda_ext._C_sm90a. What it reads
from the environment: see wanda_ext/README.md, "Build options".
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent


def load_backend() -> Any:
    """wanda_ext/_build_backend.py by path: importing the package would need what is built here."""
    path = ROOT / "wanda_ext" / "_build_backend.py"
    spec = importlib.util.spec_from_file_location("_build_backend", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


backend = load_backend()


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


class Cuda(NamedTuple):
    """What CUDA code is compiled with."""

    home: Path
    version: str  # of nvcc
    archs: list[str]
    include: list[str]
    library_dirs: list[str]


def find_cuda() -> Cuda | None:
    home = backend.find_cuda_home(backend.cuda_mode())
    if home is None:
        return None
    return Cuda(
        home,
        backend.nvcc_version(home),
        backend.cuda_archs(backend.known_archs(home)),
        [str(backend.fetch_cutlass() / "include")],
        [str(home / lib) for lib in ("lib64", "lib") if (home / lib).is_dir()],
    )


INCLUDE = [str(ROOT / "csrc/include"), str(ROOT / "csrc")]
# -g0: python's own flags ask for debug information. No contraction and no fast-math: results are
# the same bits everywhere.
CXX = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
CXX += ["-fno-math-errno", "-Wall", "-Wextra"]
NVCC = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
NVCC += ["-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"]
# Nothing that is linked in statically may be found by another library, or be replaced by it.
LINK = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
LINK_CUDA = ["-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]


def system_includes(*directories: str) -> list[str]:
    """For the bindings, which alone include them; as system headers they do not warn."""
    return [f"-isystem{directory}" for directory in directories]


def portable_extension(cuda: Cuda | None) -> Extension:
    """wanda_ext._C: schema, CPU ops, build info and, with a toolkit, the portable CUDA kernels.

    It uses torch's stable ABI, so the binary loads in torch 2.10 and everything newer, CPU or CUDA.
    """
    import pybind11
    import torch
    from torch.utils import cpp_extension

    files = sources("csrc/core/cpu/*.cpp", "csrc/bindings/*.cpp")
    files = [f for f in files if not f.endswith("_sm90a.cpp")]
    cxx = CXX + system_includes(pybind11.get_include(), *cpp_extension.include_paths())
    cxx += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    cxx += [f'-DWANDA_EXT_BUILT_WITH_TORCH="{torch.__version__}"']
    nvcc: list[str] = []
    if cuda is None:
        files = [f for f in files if not f.endswith("_cuda.cpp")]
    else:
        files += sources("csrc/core/cuda/*.cu")
        cxx += ["-DWANDA_EXT_WITH_CUDA", f'-DWANDA_EXT_CUDA_ARCHS="{";".join(cuda.archs)}"']
        cxx += [f'-DWANDA_EXT_NVCC="{cuda.version}"']
        nvcc = NVCC + backend.gencode_flags(cuda.archs)
    return Extension(
        "wanda_ext._C",
        files,
        include_dirs=INCLUDE + (cuda.include if cuda else []),
        library_dirs=cpp_extension.library_paths() + (cuda.library_dirs if cuda else []),
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=LINK + (LINK_CUDA if cuda else []),
        language="c++",
    )


def wgmma_extension(cuda: Cuda) -> Extension:
    """wanda_ext._C_sm90a: linear_24's wgmma kernels, a table for _C.

    Apart, for their code runs on compute capability 9.0 alone and has flags of its own. It knows
    nothing of torch.
    """
    import pybind11

    return Extension(
        "wanda_ext._C_sm90a",
        sources(
            "csrc/core/cuda/sm90/*.cu", "csrc/core/cuda/sm90/*.cpp", "csrc/bindings/*_sm90a.cpp"
        ),
        include_dirs=INCLUDE + cuda.include,
        library_dirs=cuda.library_dirs,
        extra_compile_args={
            "cxx": CXX + system_includes(pybind11.get_include()),
            "nvcc": [*NVCC, "-DNDEBUG", *backend.gencode_flags(["90a"])],
        },
        extra_link_args=LINK + LINK_CUDA,
        language="c++",
    )


def check_ptxas(cuda: Cuda) -> None:
    """Lets the build run nvcc, or what the user runs instead, through check_ptxas.sh."""
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():  # without it, torch runs nvcc itself
        raise backend.BuildError("ninja is missing; `pip install ninja`")
    nvcc = os.environ.get("PYTORCH_NVCC")
    if nvcc is None:
        # From torch 2.13 on, ccache where there is one.
        wrap = getattr(cpp_extension, "_wrap_compiler", lambda compiler: [compiler])
        nvcc = shlex.join(wrap(str(cuda.home / "bin/nvcc")))
    script = ROOT / "csrc/core/cuda/sm90/check_ptxas.sh"
    os.environ["PYTORCH_NVCC"] = f"sh {shlex.quote(str(script))} {nvcc}"


def extensions() -> list[Extension]:
    import torch
    from torch.utils import cpp_extension

    cuda = find_cuda()
    built = [portable_extension(cuda)]
    about = "no CUDA"
    if cuda is not None:
        cpp_extension.CUDA_HOME = str(cuda.home)  # where BuildExtension looks for nvcc
        # It would refuse a toolkit whose major version is not torch's. Here the two never meet: the
        # kernels include nothing of torch and bring the CUDA runtime along.
        vars(cpp_extension)["_check_cuda_version"] = lambda *_: None
        wgmma = backend.has_wgmma(cuda.archs, cuda.version)
        if wgmma:
            check_ptxas(cuda)
            built.append(wgmma_extension(cuda))
        about = f"CUDA in {cuda.home} for {';'.join(cuda.archs)}, {'' if wgmma else 'no '}wgmma"
    jobs = os.environ.setdefault("MAX_JOBS", str(backend.max_jobs()))
    files = [file for extension in built for file in extension.sources]
    cu = sum(file.endswith(".cu") for file in files)
    work = f"{len(files) - cu} C++ and {cu} CUDA files, {jobs} jobs"
    print(f"wanda_ext: torch {torch.__version__}, {about}: {work}", flush=True)
    return built


if {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv):
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
else:  # metadata and source archives need neither torch nor a compiler
    setup()
