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
    README,
    ROOT,
    floor_of,
    imports_within_the_package,
    includes,
    modules,
    registered_ops,
    repository_files,
    sources,
    tree,
)

import wanda_ext
from wanda_ext import ops, reference
from wanda_ext.register import FAKES

TEXT = {".py", ".cpp", ".cu", ".h", ".md", ".toml", ".txt", ".in", ".yaml", ".json", ""}
TESTED_WITH = {  # modules whose tests are in another's file
    "_build_backend": "build",
    "demo_model": "demo",
    "demo_plot": "demo",
    "op_checks": "ops_errors",
    "lora_layers": "adapters",
    "page_commands": "page",
    "packed_linear": "linear",
    "page_plots": "page",
    "page_style": "page",
    "page_tables": "page",
    "reconstruct": "repair",
    "repair_report": "repair",
    "stopped": "prune",
    "twins": "block_errors",
    "writer": "stream",
}
MORE_TESTS = {  # not named after a module
    "test_bench_linear_24",
    "test_bench_linear_bitmap",
    "test_bench_model",
    "test_docs",
    "test_families",
    "test_gpu",
    "test_gpu_bitmap",
    "test_gpu_check",
    "test_gpu_check_claims",
    "test_gpu_linear_24",
    "test_house",
    "test_ops_bitmap",
    "test_page_browser",
    "test_reproduce_paper",
    "test_sparsegpt",
}


# --- README's tree --------------------------------------------------------------------------------


def test_readme_tree_equals_disk() -> None:
    entries = list(tree())
    leaves = [e for e in entries if not any(o != e and o.startswith(e) for o in entries)]

    def covers(entry: str, file: str) -> bool:
        return f"{file}/".startswith(entry) if entry.endswith("/") else file == entry

    unlisted = [f for f in repository_files() if not any(covers(leaf, f) for leaf in leaves)]
    absent = [leaf for leaf in leaves if not any(covers(leaf, f) for f in repository_files())]
    assert not unlisted, "files that README's tree lacks"
    assert [a for a in absent if a != "benchmarks/results/"] == [], "files only README's tree has"


def test_the_tree_is_read_right() -> None:
    assert tree()["wanda_ext/prune.py"] == 4
    assert tree()["csrc/core/"] == 0
    assert tree()["setup.py"] is None


# --- Floors ---------------------------------------------------------------------------------------


def test_imports_only_go_down() -> None:
    pairs = list(imports_within_the_package())
    assert ("wanda_ext.lockstep", "wanda_ext.walk") in pairs
    for module, imported in pairs:
        upper, lower = floor_of(module), floor_of(imported)
        assert lower is not None, f"{imported} has no floor in README's tree"
        assert upper is not None, f"{module} has no floor in README's tree"
        assert lower <= upper, f"{module} (floor {upper}) imports {imported} (floor {lower})"


def test_no_import_runs_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports_within_the_package():
        graph.setdefault(module, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


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
    tests = {p.name: p.read_text(encoding="utf-8") for p in sources("python_tests/test_*.py")}
    assert op in FAKES, f"{op} has no fake in wanda_ext/register.py"
    assert re.search(rf"^Status {plain}\(", contract, re.MULTILINE), f"{op} is not in ops.h"
    assert (ROOT / f"csrc/core/cpu/{plain}.cpp").is_file(), f"{op} has no CPU file"
    in_cpp = any(f"{plain}(" in p.read_text(encoding="utf-8") for p in sources("csrc/tests/*.cpp"))
    assert in_cpp, f"{op} has no C++ test"
    for module in (ops, reference):
        function: Any = getattr(module, op, None)
        assert function is not None, f"{op} is not in {module.__name__}"
        assert "Shapes:" in (function.__doc__ or ""), f"{module.__name__}.{op} has no `Shapes:`"
    assert inspect.signature(getattr(ops, op)) == inspect.signature(getattr(reference, op))
    assert f'"{op}"' in tests["test_register.py"], f"{op} has no arguments for opcheck"
    compared = tests["test_ops.py"] + tests["test_ops_bitmap.py"]
    assert re.search(rf"\b{op}\b", compared), f"{op} is not compared with its oracle"


# --- Files ----------------------------------------------------------------------------------------


def test_tests_mirror_the_package() -> None:
    names = [m.removeprefix("wanda_ext.").split(".")[0] for m in modules() if m != "wanda_ext"]
    expected = {f"test_{TESTED_WITH.get(name, name)}" for name in ("init", *names)}
    present = {path.stem for path in sources("python_tests/test_*.py")}
    assert expected - present == set(), "modules without a test file"
    assert present - expected - MORE_TESTS == set(), "test files without a module"


def test_every_module_says_what_it_is() -> None:
    for path in sources("wanda_ext/**/*.py", "python_tests/*.py", "benchmarks/*.py", "setup.py"):
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
                near = (name, f"csrc/{name}")  # csrc/README.md names its own files
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


def test_figures_in_readme_are_the_measured_ones() -> None:
    section = README.split("\n## Measured\n")[1].split("\n## ")[0]
    with_source = r"<!-- results: (\S+)\n(.*?) -->\n((?:\|[^\n]*\n)+)"
    tables = re.findall(with_source, section, re.DOTALL)
    assert len(tables) == section.count("\n|---") > 0, "a table without its source"
    for file, columns, table in tables:
        for row in table.splitlines()[2:]:
            label, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            for cell, keys in zip(cells, columns.splitlines(), strict=True):
                value = measured(file, keys.format(row=label))
                decimals = len(cell.partition(".")[2])
                assert f"{value:,.{decimals}f}" == cell, keys.format(row=label)


def test_one_version() -> None:
    version = re.escape(wanda_ext.__version__)
    places = {
        "pyproject.toml": rf'^version = "{version}"$',
        "CMakeLists.txt": rf"^project\(wanda_ext VERSION {version} ",
        "CHANGELOG.md": rf"^## {version}$",
    }
    for name, pattern in places.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(pattern, text, re.MULTILINE), f"{name} has no version {version}"
