"""What test_house.py reads: the repository's files, README's tree, imports, includes, schema."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wanda_ext"
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


@functools.cache
def tree() -> dict[str, int | None]:
    """Path of each entry (directories end in "/") -> its floor, from README's tree."""
    block = README.split("## What is where")[1].split("```text\n")[1].split("```")[0]
    entries: dict[str, int | None] = {}
    parents: list[str] = []
    for line in block.splitlines():
        found = re.fullmatch(r"( *)(\S+)(?: +(?:([0-5]) )?.*)?", line)
        assert found, line
        depth = len(found[1]) // 2
        path = "".join([*parents[:depth], found[2]])
        parents[depth:] = [found[2]]
        entries[path] = int(found[3]) if found[3] else None
    return entries


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = {p: p.relative_to(ROOT).with_suffix("").parts for p in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): p for p, parts in files.items()}


def floor_of(module: str) -> int | None:
    path = modules()[module].relative_to(ROOT).as_posix() if module in modules() else ""
    for entry in (path, path.rpartition("/")[0] + "/"):
        if entry in tree() and entry != "wanda_ext/":
            return tree()[entry]
    return 1 if module == "wanda_ext._C" else None


def imports_of(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    known = {*modules(), "wanda_ext._C"}
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [a.name for a in node.names if a.name != "__version__"]  # stands first in it
            full = [f"{node.module}.{name}" for name in names]
            yield from (name if name in known else str(node.module) for name in full)


def imports_within_the_package() -> Iterator[tuple[str, str]]:
    for module in modules():
        for imported in imports_of(module):
            if imported.split(".")[0] == "wanda_ext":
                yield module, imported


def includes(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def registered_ops() -> list[str]:
    schema = (ROOT / "csrc/bindings/library.cpp").read_text(encoding="utf-8")
    return re.findall(r'm\.def\(\s*"(\w+)\(', schema)
