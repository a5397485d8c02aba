"""What test_house.py reads: the repository's files, the rooms, imports, includes, the schema."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wanda_ext"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# From top to bottom: a room imports only what stands below it.
ROOMS = (
    *("cli", "__init__"),  # the command line is a user of the public names
    *("quality", "stream", "prune", "runner", "bench", "report", "calibration", "models"),
    *("finetune", "checkpoint", "packed", "methods", "files", "ops"),
    *("reference", "info", "interrupt", "stopped", "_version", "_build_backend"),
    *("_C", "_C_sm90a"),
)
NO_TRANSFORMERS = ROOMS[ROOMS.index("packed") :]  # from here down


@functools.cache
def repository_files() -> tuple[str, ...]:
    """Paths of what is tracked, or would be; skips where there is no git repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository: what belongs to the sources is not known")
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(sorted(f for f in listed.split("\0") if f and (ROOT / f).exists()))


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    assert found, patterns
    return found


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = {p: p.relative_to(ROOT).with_suffix("").parts for p in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): p for p, parts in files.items()}


def room_of(module: str) -> str:
    """The room that a module belongs to: "packed" for wanda_ext.packed.bitmap; "" for the root."""
    _, _, rest = module.partition(".")
    return rest.partition(".")[0]


class Import(NamedTuple):
    """One name that a module of the package imports from another of its modules."""

    by: str  # dotted names
    of: str
    name: str  # "" for a module as a whole


def imports_of(module: str, code: str) -> Iterator[Import]:
    """What the code of a module imports from the package, anywhere in it."""
    known = {*modules(), "wanda_ext._C", "wanda_ext._C_sm90a"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (Import(module, a.name, "") for a in node.names if a.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if str(node.module).partition(".")[0] == "wanda_ext":
                for name in (alias.name for alias in node.names):
                    inner = f"{node.module}.{name}"
                    whole = inner in known
                    yield Import(
                        module, inner if whole else str(node.module), "" if whole else name
                    )


def imports_within_the_package() -> Iterator[Import]:
    for module, path in modules().items():
        yield from imports_of(module, path.read_text(encoding="utf-8"))


def includes(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def registered_ops() -> list[str]:
    schema = (ROOT / "csrc/bindings/library.cpp").read_text(encoding="utf-8")
    return re.findall(r'm\.def\(\s*"(\w+)\(', schema)
