"""Builds wanda_ext._C. What it reads from the environment: see README.md, "Build options"."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

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


def portable_extension() -> Extension:
    """wanda_ext._C: schema, CPU ops, build info and, with a toolkit, the portable CUDA kernels.

    It uses torch's stable ABI, so the binary loads in torch 2.10 and everything newer, CPU or CUDA.
    """
    import pybind11
    import torch
    from torch.utils import cpp_extension

    files = sources("csrc/core/cpu/*.cpp", "csrc/bindings/*.cpp")
    include = [str(ROOT / "csrc/include"), str(ROOT / "csrc")]
    library_dirs = cpp_extension.library_paths()
    # -g0: python's own flags ask for debug information. No contraction and no fast-math: results
    # are the same bits everywhere.
    cxx = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
    cxx += ["-fno-math-errno", "-Wall", "-Wextra"]
    # Only the bindings include these, and .cu files must not; as system headers they do not warn.
    cxx += [f"-isystem{p}" for p in (pybind11.get_include(), *cpp_extension.include_paths())]
    cxx += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    cxx += [f'-DWANDA_EXT_BUILT_WITH_TORCH="{torch.__version__}"']
    nvcc: list[str] = []
    # Nothing that is linked in statically may be found by another library, or be replaced by it.
    link = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]

    home = backend.find_cuda_home(backend.cuda_mode())
    if home is None:
        files = [f for f in files if not f.endswith("_cuda.cpp")]
    else:
        cpp_extension.CUDA_HOME = str(home)  # where BuildExtension looks for nvcc
        # It would refuse a toolkit whose major version is not torch's. Here the two never meet: the
        # kernels include nothing of torch and bring the CUDA runtime along.
        vars(cpp_extension)["_check_cuda_version"] = lambda *_: None
        cutlass = backend.fetch_cutlass()
        archs = backend.cuda_archs(backend.known_archs(home))
        files += sources("csrc/core/cuda/*.cu")
        include += [str(cutlass / "include")]
        library_dirs += [str(home / lib) for lib in ("lib64", "lib") if (home / lib).is_dir()]
        cxx += ["-DWANDA_EXT_WITH_CUDA", f'-DWANDA_EXT_CUDA_ARCHS="{";".join(archs)}"']
        cxx += [f'-DWANDA_EXT_NVCC="{backend.nvcc_version(home)}"']
        nvcc = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all"]
        nvcc += ["-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"]
        nvcc += backend.gencode_flags(archs)
        link += ["-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]

    jobs = os.environ.setdefault("MAX_JOBS", str(backend.max_jobs()))
    cuda = f"CUDA in {home} for {';'.join(archs)}" if home else "no CUDA"
    print(f"wanda_ext: torch {torch.__version__}, {cuda}, {jobs} jobs", flush=True)
    return Extension(
        "wanda_ext._C",
        files,
        include_dirs=include,
        library_dirs=library_dirs,
        libraries=["torch_cpu"],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )


if {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv):
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=[portable_extension()], cmdclass={"build_ext": BuildExtension})
else:  # metadata and source archives need neither torch nor a compiler
    setup()
