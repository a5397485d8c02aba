"""The house rules, each one a test. What is broken is named in the failure."""

from __future__ import annotations

import ast
import graphlib
import inspect
import json
import re
from typing import Any

import pytest
from house import (
    NO_TRANSFORMERS,
    README,
    ROOMS,
    ROOT,
    Import,
    imports_of,
    imports_within_the_package,
    includes,
    modules,
    registered_ops,
    repository_files,
    room_of,
    sources,
)

import wanda_ext
from wanda_ext import ops, reference
from wanda_ext.ops.register import FAKES

TESTS = "python_tests/**/test_*.py"
TEXT = {".py", ".cpp", ".cu", ".h", ".md", ".toml", ".txt", ".in", ".yaml", ".json", ""}
TESTED_WITH = {  # modules whose tests are in another's file
    "finetune/lora_layers": "finetune/adapters",
    "cli/demo_model": "cli/demo",
    "methods/magnitude": "methods/methods",
    "methods/method": "methods/methods",
    "methods/wanda": "methods/methods",
    "models/twins": "quality/block_errors",
    "packed/linear": "packed/linear_24",
    "quality/reconstruct": "quality/repair",
    "report/plots": "report/page",
    "report/style": "report/page",
    "report/tables": "report/page",
    "runner/held": "runner/lockstep",
    "stopped": "prune/prune",
    "_build_backend": "build",
    "_version": "house",
}
MORE_TESTS = {
    "docs",
    "gpu",
    "house",
    "init",
    "checkpoint/mutants",
    "prune/golden_masks",
    "models/families",
}  # of no module, or of all


# --- Rooms ----------------------------------------------------------------------------------------


def fault_of(found: Import) -> str:
    """What is wrong with an import: it runs up, or takes another room's private name; else ""."""
    by, of = (room_of(module) or "__init__" for module in (found.by, found.of))
    if by == of:
        return ""
    if ROOMS.index(by) > ROOMS.index(of):
        return f"{found.by} ({by}) imports {found.of} ({of}), which stands above it"
    if re.match("_[a-z]", found.name):
        return f"{found.by} imports {found.name} of {found.of}: a private name of another room"
    return ""


def test_every_room_has_its_place() -> None:
    rooms = {room_of(module) or "__init__" for module in modules()}
    assert rooms | {"_C", "_C_sm90a"} == set(ROOMS) and len(set(ROOMS)) == len(ROOMS)


def test_imports_only_go_down() -> None:
    found = list(imports_within_the_package())
    assert ("wanda_ext.runner.lockstep", "wanda_ext.runner.walk", "Walk") in found
    assert ("wanda_ext.cli.main", "wanda_ext", "") in found
    assert [fault for each in found if (fault := fault_of(each))] == []


@pytest.mark.parametrize(
    ("module", "line", "told"),
    [
        ("wanda_ext.packed.fuse", "import wanda_ext.checkpoint.save", "stands above it"),
        ("wanda_ext.packed.fuse", "from wanda_ext.checkpoint import save", "stands above it"),
        ("wanda_ext.packed.fuse", "from wanda_ext import swap_linears", "stands above it"),
        (
            "wanda_ext.packed.fuse",
            "def f():\n    from wanda_ext.models import X",
            "stands above it",
        ),
        ("wanda_ext.interrupt", "from wanda_ext import ops", "stands above it"),
        ("wanda_ext.prune.plan", "from wanda_ext.packed.fuse import _kind", "a private name"),
        ("wanda_ext.prune.plan", "from wanda_ext.packed.fuse import merged", ""),
        ("wanda_ext.prune.plan", "from wanda_ext.prune.owl import _share", ""),
        ("wanda_ext.cli.main", "from wanda_ext._version import __version__", ""),
    ],
)
def test_an_import_that_runs_up_is_seen(module: str, line: str, told: str) -> None:
    (found,) = imports_of(module, line)
    fault = fault_of(found)
    assert told in fault and bool(told) == bool(fault)


def test_no_import_runs_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for by, of, _ in imports_within_the_package():
        graph.setdefault(by, set()).add(of)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_the_package_is_seen_at_one_glance() -> None:
    entries = {file.split("/")[1] for file in repository_files() if file.startswith("wanda_ext/")}
    assert len(entries) <= 25, sorted(entries)


def test_readme_shows_the_rooms() -> None:
    shown = re.findall(r"^  (\w+)(?:/|\.py) ", README.split("## What is where")[1], re.MULTILINE)
    rooms = [room for room in ROOMS if not room.startswith("_C")]
    assert [room for room in rooms if room not in (*shown, "__init__")] == []
    assert [name for name in shown if name in rooms] == [room for room in rooms if room in shown]


def test_from_packed_down_nothing_knows_transformers() -> None:
    below = [m for m in modules() if m != "wanda_ext" and room_of(m) in NO_TRANSFORMERS]
    assert "wanda_ext.packed.linear" in below and "wanda_ext.info" in below
    for module in below:
        code = modules()[module].read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) transformers\b", code, re.MULTILINE), module


# --- Floors 0 and 1 -------------------------------------------------------------------------------


def test_floor_0_knows_neither_torch_nor_python() -> None:
    for path in sources("csrc/core/**/*.*", "csrc/include/**/*.h", "csrc/tests/**/*.*"):
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", header), (path, header)


def test_cutlass_is_known_only_to_the_core() -> None:
    for path in sources("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu"):
        if path.relative_to(ROOT / "csrc").parts[0] not in ("core", "tests"):
            assert not [h for h in includes(path) if re.match(r"cut(lass|e)/", h)], path


def test_bindings_use_the_stable_abi_and_hold_no_kernel() -> None:
    assert not list((ROOT / "csrc/bindings").glob("*.cu*"))
    for path in sources("csrc/bindings/*"):
        for header in includes(path):
            stable = header.startswith("torch/csrc/stable/") or "shim" in header
            foreign = re.match(r"(torch|ATen|c10)/", header)
            assert stable or not foreign, f"{path}: {header} is not of the stable ABI"


# --- Ops ------------------------------------------------------------------------------------------


def test_the_schema_is_read_right() -> None:
    assert len(registered_ops()) == len(set(registered_ops())) >= 7
    assert {"input_sumsq_", "linear_24"} <= set(registered_ops())
    assert set(ops.OPS) == set(registered_ops())


@pytest.mark.parametrize("op", registered_ops())
def test_every_op_is_complete(op: str) -> None:
    plain = op.rstrip("_")
    contract = (ROOT / "csrc/include/wanda_ext/ops.h").read_text(encoding="utf-8")
    tests = {p.stem: p.read_text(encoding="utf-8") for p in sources(TESTS)}
    assert op in FAKES, f"{op} has no fake in wanda_ext/ops/register.py"
    assert re.search(rf"^Status {plain}\(", contract, re.MULTILINE), f"{op} is not in ops.h"
    assert (ROOT / f"csrc/core/cpu/{plain}.cpp").is_file(), f"{op} has no CPU file"
    in_cpp = any(f"{plain}(" in p.read_text(encoding="utf-8") for p in sources("csrc/tests/*.cpp"))
    assert in_cpp, f"{op} has no C++ test"
    for module in (ops, reference):
        function: Any = getattr(module, op, None)
        assert function is not None, f"{op} is not in {module.__name__}"
        assert "Shapes:" in (function.__doc__ or ""), f"{module.__name__}.{op} has no `Shapes:`"
    assert inspect.signature(getattr(ops, op)) == inspect.signature(getattr(reference, op))
    assert f'"{op}"' in tests["test_register"], f"{op} has no arguments for opcheck"
    compared = "".join(tests[name] for name in tests if name.startswith("test_functions"))
    assert re.search(rf"\b{op}\b", compared), f"{op} is not compared with its oracle"


# --- Files ----------------------------------------------------------------------------------------


def test_tests_mirror_the_rooms() -> None:
    paths = [path.relative_to(ROOT / "python_tests") for path in sources(TESTS)]
    present = {path.parent / path.stem.removeprefix("test_") for path in paths}
    present = {path.as_posix() for path in present if path.parts[0] != "benchmarks"}
    names = [module.split(".", 1)[1].replace(".", "/") for module in modules() if "." in module]
    expected = {TESTED_WITH.get(name, name) for name in names if name not in ROOMS[:-8]}
    assert expected - present == set(), "modules without a test file"

    def told_by_name(test: str) -> bool:  # packed/fuse_groups is of packed/fuse
        return any(test == name or test.startswith(f"{name}_") for name in expected | MORE_TESTS)

    assert [test for test in sorted(present) if not told_by_name(test)] == []


def test_every_module_says_what_it_is() -> None:
    for path in sources("wanda_ext/**/*.py", "python_tests/**/*.py", "benchmarks/*.py", "setup.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_project_names_no_machine() -> None:
    machine = re.compile(r"(?<![\w.$}])/(?:root|work|home|Users)/")
    for name in repository_files():
        path = ROOT / name
        if path.suffix in TEXT and path.is_file():
            found = machine.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name} names a machine's path: {found}"
    assert machine.search(" /" + "root/x")


# --- Documents ------------------------------------------------------------------------------------


def test_paths_named_in_documents_exist() -> None:
    listed = repository_files()
    documents = [name for name in listed if name.endswith(".md")]
    assert len(documents) >= 4
    for document in documents:
        text = (ROOT / document).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)/?`", text):
            if not name.startswith("torch/") and "X" not in name:  # test_X.py
                near = (name, f"{document.rpartition('/')[0]}/{name}")  # or of its own folder
                known = any(f"{file}/".startswith(f"{n}/") for file in listed for n in near)
                assert known, f"{document} names {name}"


def measured(file: str, keys: str) -> float:
    """The value at KEY > KEY > ... of a file of results; a list's entries go by name or op."""
    value: Any = json.loads((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8"))
    path = keys.split(" > ")
    if path[0].endswith(".json"):  # of another file than the table's others
        return measured(path[0], " > ".join(path[1:]))
    for key in path:
        if isinstance(value, list):
            value = next(v for v in value if key in (v.get("name"), v.get("op")))
        else:
            value = value[key]
    return float(value)


WITH_FIGURES = {"README.md": 2, "benchmarks/README.md": 13, "wanda_ext/README.md": 0}


def test_figures_in_documents_are_the_measured_ones() -> None:
    with_source = r"<!-- results: (\S+)\n(.*?) -->\n((?:\|[^\n]*\n)+)"
    for document, count in WITH_FIGURES.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        tables = re.findall(with_source, text, re.DOTALL)
        assert len(tables) == text.count("<!-- results:") == count, f"{document}: a broken comment"
        for file, columns, table in tables:
            for row in table.splitlines()[2:]:
                label, *cells = (cell.strip() for cell in row.strip("|").split("|"))
                for cell, keys in zip(cells, columns.splitlines(), strict=True):
                    value = measured(file, keys.format(row=label))
                    decimals = len(cell.partition(".")[2])
                    assert f"{value:,.{decimals}f}" == cell, (document, keys.format(row=label))


def test_every_table_of_figures_has_its_source() -> None:
    table = r"((?:^[^\n|]*\n)?)^\|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)"
    for document in WITH_FIGURES:
        text = (ROOT / document).read_text(encoding="utf-8")
        for above, rows in re.findall(table, text, re.MULTILINE):
            cells = [cell.strip() for row in rows.splitlines() for cell in row.split("|")[2:-1]]
            figures = sum(re.fullmatch(r"[\d,]*\d\.\d+", cell) is not None for cell in cells)
            assert not figures or above.endswith("-->\n"), f"{document}: {rows}"


def test_one_version() -> None:
    version = re.escape(wanda_ext.__version__)
    places = {
        "wanda_ext/_version.py": rf'^__version__ = "{version}"$',
        "pyproject.toml": rf'^version = "{version}"$',
        "CMakeLists.txt": rf"^project\(wanda_ext VERSION {version} ",
        "CHANGELOG.md": rf"^## {version}$",
    }
    for name, pattern in places.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(pattern, text, re.MULTILINE), f"{name} has no version {version}"
