"""`python -m wanda_ext.info`: what was built, what is here, and what to do where they do not meet.

It needs neither a device nor a compiled part that loads, for it is what one runs to find out why.
"""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from wanda_ext._version import __version__

REBUILD = "run `{}pip install .` in the source tree"


def build_info() -> dict[str, Any]:
    """What this binary was built with and for, what is here, and advice.

    `compiled`: dict of "torch", "compiler", "cuda" (bool), "cuda_stream" (bool: this torch shares
    its current stream), "wgmma" (bool: the kernels of compute capability 9.0 are here) and, None
    without CUDA, "cuda_archs" (such as "80;90+PTX"), "nvcc", "cutlass"; `compiled` is None where
    the compiled part does not load.
    `python`, `platform`, `torch`, `torch_cuda` (None: a torch for the CPU), `devices` (a list of
    "name", "capability" as "9.0"). `advice`: one sentence for each thing that is missing.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": None,
        "torch_cuda": None,
        "devices": [],
        "compiled": None,
        "advice": [],
    }
    try:
        torch = import_module("torch")
    except ImportError as error:
        info["advice"].append(f"torch does not load ({error}): install torch 2.10 or newer")
        return info
    info["torch"] = torch.__version__
    info["torch_cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            info["devices"].append({"name": name, "capability": f"{major}.{minor}"})
    try:
        compiled = import_module("wanda_ext._C").build_info()
        compiled["wgmma"] = bool(compiled["cuda"] and find_spec("wanda_ext._C_sm90a"))
        if compiled["wgmma"]:
            import_module("wanda_ext._C_sm90a")
        info["compiled"] = compiled
    except ImportError as error:
        info["advice"].append(
            f"the compiled part does not load ({error}): {REBUILD.format('')}, and start Python "
            "elsewhere, for there the sources hide what was installed"
        )
        return info
    info["advice"] += _advice(info)
    return info


def _advice(info: dict[str, Any]) -> list[str]:
    compiled, devices = info["compiled"], info["devices"]
    if not compiled["cuda"]:
        if not devices:
            return []
        return [
            f"built without CUDA, but there is a {devices[0]['name']}: "
            f"{REBUILD.format('WANDA_EXT_CUDA=1 ')} with a CUDA toolkit installed, or with "
            "WANDA_EXT_CUDA=pypi, which fetches the compiler"
        ]
    if info["torch_cuda"] is None:
        return ["built with CUDA, but this torch is one for the CPU: install torch with CUDA"]
    if not devices:
        return ["built with CUDA, but torch sees no CUDA device: check the driver (nvidia-smi)"]
    return [advice for device in devices if (advice := _advice_for(device, compiled))]


def _advice_for(device: dict[str, str], compiled: dict[str, Any]) -> str:
    name, capability = device["name"], device["capability"]
    rebuild = REBUILD.format(f"WANDA_EXT_CUDA_ARCHS={capability.replace('.', '')} ")
    if not runs_on(compiled["cuda_archs"], capability):
        return f"{name} has compute capability {capability}, which was not built for: {rebuild}"
    if capability == "9.0" and not compiled["wgmma"]:
        return f"{name} could run faster kernels (wgmma): {rebuild}, with nvcc 12.2 or newer"
    return ""


def runs_on(archs: str, capability: str) -> bool:
    """Whether code for `archs` ("80;90a;120+PTX") runs on a device of this capability ("8.6").

    Machine code runs on its own major version from its minor version on, except that of "90a",
    which runs on 9.0 alone, and of "100f", which we treat likewise; PTX on everything newer.
    """
    major, minor = map(int, capability.split("."))
    for arch in archs.split(";"):
        number = arch.removesuffix("+PTX")
        built = int(number.rstrip("af"))
        if built == 10 * major + minor:
            return True
        if number[-1].isdigit():
            newer = built < 10 * major + minor
            if newer and (built // 10 == major or arch.endswith("+PTX")):
                return True
    return False


def main() -> int:
    """Prints build_info; returns 1 where there is no compiled part to use."""
    info = build_info()
    compiled = info["compiled"]
    print(f"wanda_ext {info['version']}, Python {info['python']}, {info['platform']}")
    if compiled is None:
        print("built     nothing that loads")
    else:
        print(f"built     with torch {compiled['torch']}, {compiled['compiler']}")
        if compiled["cuda"]:
            wgmma = "with" if compiled["wgmma"] else "without"
            print(f"          CUDA for {compiled['cuda_archs'].replace(';', ', ')}, {wgmma} wgmma")
            print(f"          nvcc {compiled['nvcc']}, CUTLASS {compiled['cutlass']}")
        else:
            print("          CPU only, without CUDA")
    cuda = f"CUDA {info['torch_cuda']}" if info["torch_cuda"] else "CPU only"
    print(f"torch     {info['torch']} ({cuda})" if info["torch"] else "torch     none that loads")
    for device in info["devices"]:
        print(f"device    {device['name']}, compute capability {device['capability']}")
    if not info["devices"]:
        print("device    CPU")
    for advice in info["advice"]:
        print(f"to do     {advice}")
    return 0 if compiled else 1


if __name__ == "__main__":
    raise SystemExit(main())
