#!/usr/bin/env python3
"""One run on a GPU that proves what it can in ten minutes, the most valuable first.

    gpu_check.py prepare --python 3.12 --archs 90 --out DIR [--build CMAKE_BUILD]
    gpu_check.py run [--prepared DIR] --out OUT [--seconds 560] [--only STEP...]

`prepare` needs nvcc and no GPU. It builds the wheel for one CPython and the C++ programs into DIR,
a folder of some MB to carry, which holds this program too. `run` needs a GPU and that CPython with
torch, the dependencies of wanda_ext and pytest (pytest-xdist makes it faster), and for one step
each Nsight Compute and compute-sanitizer; no compiler, no network. It builds nothing and writes to
OUT alone:

    results.jsonl   every result as it came, with the device, its clocks, versions and the commit
    log             what all programs said
    junit.xml, ncu.csv, dispatch.json (the fastest kernels, as wanda_ext reads them), table.txt

Every step has its own limit, and none ends the run. At the end comes a table: claim, figure,
whether it holds. Exit status 0: every step ended well; 1: one did not; 3: there is no device, and
every step got as far as finding that out; 2: the command line is wrong. A second run into the same
OUT adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import gpu_claims
import gpu_device
from gpu_prepare import ROOT, PrepareError, prepare
from gpu_run import Command, Run, Step, Tool

SECONDS = 560

NCU = Tool(
    "ncu",
    (
        *(
            "--clock-control",
            "none",
            "--profile-from-start",
            "off",
            "--csv",
            "--log-file",
            "{made}",
        ),
        *("--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"),
        *("--section", "SchedulerStats", "--section", "WarpStateStats"),
        *("--section", "LaunchStats", "--section", "Occupancy"),
    ),
    "install Nsight Compute, which is part of the CUDA toolkit",
)


def sanitizer(tool: str) -> Tool:
    options = ("--tool", tool, "--error-exitcode", "9")
    return Tool("compute-sanitizer", options, "install it; it is part of the CUDA toolkit", tool)


def steps(prepared: Path, out: Path) -> tuple[Step, ...]:
    """What is run, the most valuable first. The limits of the commands are in seconds."""

    def program(limit: float, name: str, *options: str, **more: Any) -> Command:
        return Command(limit, (str(prepared / "programs" / name), *options), **more)

    def script(limit: float, name: str, *options: str) -> Command:
        return Command(limit, (sys.executable, str(prepared / "benchmarks" / name), *options))

    def profile(limit: float, name: str, *options: str) -> Command:
        return program(limit, name, "--profile", *options, tool=NCU, writes="ncu.csv")

    def sanitized(tool: str, limit: float, name: str, *options: str) -> Command:
        small = ("--check", "--shapes", "136x272,520x2064", *options)
        return program(limit, name, *small, tool=sanitizer(tool))

    pruned = "4096x4096,11008x4096,4096x11008"
    decoded = "4096x4096,11008x4096,4096x11008,28672x8192"
    few, many = ("--m", "1,4,8,16,64"), ("--m", "2048,8192")
    lines = ("--shapes", decoded, "--lines")
    return (
        Step(
            "info",
            "what is here; ceilings: a copy, an 8192^3 dense product",
            15,
            (script(25, "gpu_ceilings.py"),),
        ),
        Step(
            "check",
            "every linear_24 kernel and split, every linear_bitmap shape, every pruning op, once",
            30,
            (
                program(18, "linear_24", "--check"),
                program(10, "linear_bitmap", "--check"),
                program(10, "pruning", "--check"),
            ),
        ),
        Step(
            "tests",
            "pytest on what needs a GPU, in parallel",
            85,
            (script(85, "gpu_tests.py", "--junit", str(out / "junit.xml")),),
        ),
        Step(
            "pruning",
            "pruning ops beside a copy, 3 shapes",
            60,
            (
                program(10, "pruning"),
                script(
                    50, "bench_prune_cuda.py", "--shapes", pruned, "--seconds", "0.5", "--lines"
                ),
            ),
        ),
        Step(
            "decode",
            "1 to 64 tokens, 4 shapes: dense, every linear_24 kernel, bitmaps",
            90,
            (
                program(45, "linear_24", "--all-kernels", "--shapes", decoded, *few),
                script(45, "bench_linear_bitmap.py", *lines, *few),
            ),
        ),
        Step(
            "prefill",
            "2048 and 8192 tokens, 4 shapes: every linear_24 kernel, cuBLAS, cuSPARSELt's choice",
            90,
            (
                program(
                    *(45, "linear_24", "--all-kernels", "--rounds", "15"),
                    *("--shapes", decoded, *many),
                ),
                script(45, "bench_linear_24.py", *lines, *many, "--own-choice"),
            ),
        ),
        Step(
            "ncu",
            "hardware counters of each kernel, once",
            80,
            (
                profile(30, "linear_24", "--m", "1,8,2048"),
                profile(15, "linear_bitmap", "--m", "1,8"),
                profile(35, "pruning"),
            ),
        ),
        Step(
            "sanitizers",
            "memcheck and racecheck on the check of 2 small shapes",
            90,
            (
                sanitized("memcheck", 25, "linear_24", "--m", "1,5,33,300", "--dtype", "bf16"),
                sanitized("memcheck", 10, "linear_bitmap", "--m", "1,5,9"),
                sanitized("memcheck", 10, "pruning"),
                sanitized("racecheck", 25, "linear_24", "--m", "1,5,33,300", "--dtype", "bf16"),
                sanitized("racecheck", 10, "linear_bitmap", "--m", "1,5,9"),
                sanitized("racecheck", 10, "pruning"),
            ),
        ),
    )


def run(prepared: Path, out: Path, seconds: float, only: list[str]) -> int:
    """All steps, or those of `only`; the exit status."""
    about = read_prepared(prepared)
    chosen = [step for step in steps(prepared, out) if not only or step.name in only]
    device = gpu_device.find()
    versions = {"python": platform.python_version(), "torch": torch_version()}
    versions["wheel"] = about["wheel"]
    this = Run(
        out,
        device,
        seconds,
        {"versions": versions, "commit": about["commit"]},
        environment(prepared),
    )
    print(f"device: {this.device.about() if this.device else 'none'}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        this.steps(chosen)
    except KeyboardInterrupt:
        print("interrupted: the steps that follow were not run")
    cells = gpu_claims.cells_of(out / "results.jsonl").values()
    table = gpu_claims.table(gpu_claims.claims(out))
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    rows = gpu_claims.dispatch_table(cells)
    if rows["rows"]:
        (out / "dispatch.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    ends = {name: ended.status for name, ended in this.ended.items()}
    print(", ".join(f"{name}: {status}" for name, status in ends.items()), flush=True)
    statuses = {ends.get(step.name, "not run") for step in chosen}
    return 3 if statuses == {"no device"} else 0 if statuses == {"ok"} else 1


def read_prepared(prepared: Path) -> dict[str, Any]:
    """prepared.json, if this is the CPython and the machine that the folder is for."""
    path = prepared / "prepared.json"
    if not path.exists():
        raise PrepareError(
            f"{prepared} has no prepared.json; `gpu_check.py prepare` makes the folder"
        )
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    here = (platform.python_version().rpartition(".")[0], platform.machine())
    wanted = (about["python"], about["machine"])
    if here != wanted:
        raise PrepareError(
            f"{prepared} is for CPython {wanted[0]} on {wanted[1]}, and this is {here[0]} on "
            f"{here[1]}; run it with that one, or prepare it for this"
        )
    return about


def torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise PrepareError(f"{sys.executable} has no torch; install it, with CUDA") from None


def environment(prepared: Path) -> dict[str, str]:
    """Of all commands: one device, the prepared wheel and programs, torch's own cuBLAS."""
    environ = dict(os.environ)
    first = [str(prepared / "site"), str(prepared / "benchmarks")]
    environ["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [environ.get("PYTHONPATH")])])
    environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as the management library counts
    environ["CUDA_VISIBLE_DEVICES"] = gpu_device.visible(os.environ) or ""
    nvidia = util.find_spec("nvidia")
    packages = nvidia.submodule_search_locations if nvidia else None
    found = [f for p in packages or () for f in sorted(Path(p).glob("*/lib/libcublas.so.*"))]
    if found:
        environ.setdefault("WANDA_EXT_CUBLAS", str(found[-1]))
    return environ


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prepare", help="builds the folder to carry")
    this_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    making.add_argument("--python", default=this_python, help="a version, or an interpreter's path")
    making.add_argument("--archs", default="90", help='such as "90", "80;90"')
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--build", type=Path, help="CMake's build folder, which is kept")
    running = commands.add_parser("run", help="runs the steps on the GPU that is here")
    running.add_argument("--prepared", type=Path, default=ROOT)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    names = [step.name for step in steps(ROOT, ROOT)]
    running.add_argument("--only", nargs="+", choices=names, default=[], metavar="STEP")
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            print(json.dumps(prepare(args.python, args.archs, args.out, args.build)))
            return 0
        prepared, out = args.prepared.absolute(), args.out.absolute()
        return run(prepared, out, args.seconds, args.only)
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
