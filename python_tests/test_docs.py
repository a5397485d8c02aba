"""What the documents show is so: blocks of Python and commands run, as they stand and in their
order; code of C++ stands in its source; links lead somewhere; names and options are complete.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from doc_world import make_world
from fresh_python import python_options
from house import ROOT, repository_files, sources

import wanda_ext
from wanda_ext.cli import main

READMES = sources("README.md", "[a-z]*/README.md")
DOCUMENTS = sources("*.md", "[a-z]*/*.md")
NOT_RUN = {  # how many blocks of the documents cannot run here, by reason
    "by .ci/run": 4,
    "needs a GPU": 4,
    "needs the network": 2,
    "needs two machines": 1,
    "takes hours, and fetches the models": 1,
    "takes minutes": 8,
    "builds the package": 1,
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Blocks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What stands between fences. not_run: why it does not run here; None: it does."""

    line: int
    language: str
    code: str
    not_run: str | None


def blocks_of(text: str) -> list[Block]:
    pattern = r"(?:^<!-- not run: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    return [Block(text[: m.start(2)].count("\n") + 1, m[2], m[3], m[1]) for m in found]


def commands_of(code: str) -> list[str]:
    """Its lines, but for empty ones and comments, and with continued ones joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def is_shell(block: Block) -> bool:
    return block.language in ("bash", "sh")


def to_run(document: Path) -> list[Block]:
    blocks = blocks_of(document.read_text(encoding="utf-8"))
    return [b for b in blocks if b.not_run is None and (is_shell(b) or b.language == "python")]


def test_blocks_are_read_right() -> None:
    text = "a\n<!-- not run: it is long -->\n```sh\nx \\\n  y\n\n# z\n```\n\n```python\nb\n```\n"
    first, second = blocks_of(text)
    assert (first.line, first.language, first.not_run) == (3, "sh", "it is long")
    assert [line.split() for line in commands_of(first.code)] == [["x", "y"]]
    assert second == Block(10, "python", "b\n", None)


def test_every_block_runs_or_says_why_not() -> None:
    reasons: Counter[str] = Counter()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = blocks_of(text)
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks), path
        marks = len(re.findall(r"^<!-- not run:", text, re.MULTILINE))
        assert marks == sum(block.not_run is not None for block in blocks), path
        for block in blocks:
            known = block.language in ("python", "bash", "sh", "text", "cpp", "cmake")
            assert known, f"{name_of(path)}:{block.line} is in {block.language!r}"
            runs = path in READMES and (is_shell(block) or block.language == "python")
            assert block.not_run is None or block.language == "python" or is_shell(block)
            assert runs or not is_shell(block) or block.not_run, f"{name_of(path)}:{block.line}"
            if block.language == "python":
                compile(block.code, f"{name_of(path)}:{block.line}", "exec")
        reasons.update(block.not_run for block in blocks if block.not_run is not None)
    assert reasons == NOT_RUN


@pytest.mark.slow
@pytest.mark.usefixtures("calm")  # a tiny model is faster on one thread
@pytest.mark.parametrize("document", [*filter(to_run, READMES)], ids=name_of)
def test_examples_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    make_world(tmp_path, monkeypatch)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in to_run(document):
        at = f"{name_of(document)}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(document), "exec"), names)
        else:
            for command in commands_of(block.code):
                assert status_of(command) == 0, f"{at}: {command}\n{''.join(capfd.readouterr())}"
    if name_of(document) == "README.md":  # the model that it loads at last is the packed one
        packed = [m for m in names["model"].modules() if isinstance(m, wanda_ext.SparseLinear24)]
        assert len(packed) == 3 * 7


def status_of(command: str) -> int:
    """The exit status. wanda-ext runs in this process, which has imported what it needs."""
    words = shlex.split(command, comments=True)
    if words[0] == "wanda-ext":
        return main(words[1:])
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        words[1] = str(ROOT / words[1])
        command = shlex.join(words)
    options = {**python_options(), "cwd": Path.cwd()}
    return subprocess.run(["bash", "-c", command], timeout=300, check=False, **options).returncode


def test_what_does_not_run_names_benchmarks_and_options_that_are_there() -> None:
    seen = 0
    for path in DOCUMENTS:
        for block in filter(is_shell, blocks_of(path.read_text(encoding="utf-8"))):
            for command in commands_of(block.code):
                for script in re.findall(r"\bbenchmarks/\S+", command):
                    source = (ROOT / script).read_text(encoding="utf-8")
                    for option in re.findall(r" (--[\w-]+)", command):
                        assert option in source, f"{name_of(path)}: {command}"
                    seen += 1
    assert seen >= 8


# --- Names and options ----------------------------------------------------------------------------

GUIDE = (ROOT / "wanda_ext/README.md").read_text(encoding="utf-8")


def names_in_table(head: str) -> list[str]:
    """What stands in code in the first cells of the table with this head, in its order."""
    table = re.search(rf"^\| {re.escape(head)} \|[^\n]*\n\|[-|]*\n((?:\|[^\n]*\n)+)", GUIDE, re.M)
    assert table is not None, head
    cells = [row.split(" | ")[0] for row in table[1].splitlines()]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_guide_lists_every_public_name_once() -> None:
    listed = names_in_table("`wanda_ext.`")
    assert Counter(listed) == Counter(wanda_ext.__all__)
    assert callable(wanda_ext.bench.tune)
    assert sorted(names_in_table("`wanda_ext.ops.`")) == sorted(wanda_ext.ops.OPS)


def options_of(command: str) -> set[str]:
    """The options that `wanda-ext COMMAND --help` tells."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        main([command, "--help"])
    usage = told.getvalue().split("\n\n")[0]
    return set(re.findall(r"--[\w-]+", usage))


def test_the_guide_lists_every_option_of_every_command() -> None:
    block = next(b for b in blocks_of(GUIDE) if b.code.startswith("wanda-ext prune MODEL"))
    told = {text.split()[0]: text for text in block.code.split("wanda-ext ")[1:]}
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", help_text.getvalue(), re.MULTILINE))
    assert commands == set(told)
    for command, text in told.items():
        assert set(re.findall(r"--[\w-]+", text)) == options_of(command), command


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    example = next(block for block in blocks_of(text) if block.language == "python")
    assert len(example.code.splitlines()) <= 10
    setups = [block for block in blocks_of(text) if block.not_run == "by .ci/run"]
    assert [len(commands_of(block.code)) for block in setups] == [1, 1]


# --- Links ----------------------------------------------------------------------------------------


def anchors_of(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def links_of(text: str) -> list[str]:
    """Targets of links and pictures, but for other sites'."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if not re.match(r"\w+:", target)]


def broken(document: Path, text: str) -> Iterator[str]:
    """Its links that lead nowhere, with why."""
    for target in links_of(text):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{target}: no such file"
        elif path and file.is_file() and name_of(file) not in repository_files():
            yield f"{target}: not of the repository"
        elif anchor:
            own = text if file == document else file.read_text(encoding="utf-8")
            if anchor not in anchors_of(own):
                yield f"{target}: no such heading"


def test_every_link_leads_somewhere() -> None:
    links = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert list(broken(document, text)) == [], name_of(document)
        links += len(links_of(text))
    assert links > 40


def test_a_broken_link_is_seen() -> None:
    text = "# A `b_c`, d\n[x](#a-b_c-d) [y](#a) [z](CHANGELOG.md) [v](no.md) ![w](../w.svg#a)\n"
    assert list(broken(ROOT / "README.md", text)) == [
        "#a: no such heading",
        "no.md: no such file",
        "../w.svg#a: no such file",
    ]
    assert anchors_of("# A\n## A\n```\n# B\n```\n") == {"a", "a-1"}


# --- Code that stands elsewhere -------------------------------------------------------------------

SHOWN = r"<!-- from: (\S+) -->\n```\w+\n(.*?)```"
PAGE = ROOT / "csrc/raw_pointer_engine.md"


def shown_in(document: str) -> list[tuple[str, str]]:
    """(source file, code) of each block of a document that says where its code is from."""
    return re.findall(SHOWN, document, re.DOTALL)


def stands_in(code: str, source: str) -> bool:
    """Whether whole lines of the source are the code, at any depth of indentation."""
    return any(
        f"\n{textwrap.indent(code, ' ' * depth)}" in f"\n{source}\n" for depth in range(0, 9, 2)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_shown_in_a_document_stands_in_its_source(document: Path) -> None:
    for name, code in shown_in(document.read_text(encoding="utf-8")):
        source = (ROOT / name).read_text(encoding="utf-8")
        assert stands_in(code, source), f"{document.name} shows, but {name} lacks:\n{code}"


def test_the_page_shows_the_whole_way_and_the_index_links_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    blocks = shown_in(page)
    assert len(blocks) == page.count("<!-- from:") == page.count("```cpp") + page.count("```cmake")
    shown = "".join(code for _, code in blocks)
    for call in ("prune_pack_24", "order_meta_24", "linear_24_choose", "linear_24_workspace"):
        assert f"cuda::{call}(" in shown, call
    for call in ("prune_nm", "pack_24", "linear_24", "ParallelFor lend"):
        assert f"wanda_ext::{call}(" in shown, call
    assert f"]({PAGE.name})" in (ROOT / "csrc/README.md").read_text(encoding="utf-8")


def test_a_block_that_drifted_is_seen() -> None:
    assert stands_in("a();\nb();\n", "{\n  a();\n  b();\n}\n")
    assert not stands_in("a();\nb();\n", "{\n  a();\n  c();\n  b();\n}\n")
    assert not stands_in("a();\n", "{\n  aa();\n}\n")
    assert shown_in("<!-- from: x.cpp -->\n```cpp\na();\n```\n") == [("x.cpp", "a();\n")]
