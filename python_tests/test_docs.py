"""Code shown in documents is code that is built and run: each block stands so in its source."""

from __future__ import annotations

import re
import textwrap

import pytest
from house import ROOT, sources

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


@pytest.mark.parametrize("document", sources("*.md", "csrc/*.md"), ids=lambda path: path.name)
def test_code_shown_in_a_document_stands_in_its_source(document):
    for name, code in shown_in(document.read_text(encoding="utf-8")):
        source = (ROOT / name).read_text(encoding="utf-8")
        assert stands_in(code, source), f"{document.name} shows, but {name} lacks:\n{code}"


def test_the_page_shows_the_whole_way_and_the_index_links_it():
    page = PAGE.read_text(encoding="utf-8")
    blocks = shown_in(page)
    assert len(blocks) == page.count("<!-- from:") == page.count("```cpp") + page.count("```cmake")
    shown = "".join(code for _, code in blocks)
    for call in ("prune_pack_24", "order_meta_24", "linear_24_choose", "linear_24_workspace"):
        assert f"cuda::{call}(" in shown, call
    for call in ("prune_nm", "pack_24", "linear_24", "ParallelFor lend"):
        assert f"wanda_ext::{call}(" in shown, call
    assert f"]({PAGE.name})" in (ROOT / "csrc/README.md").read_text(encoding="utf-8")


def test_a_block_that_drifted_is_seen():
    assert stands_in("a();\nb();\n", "{\n  a();\n  b();\n}\n")
    assert not stands_in("a();\nb();\n", "{\n  a();\n  c();\n  b();\n}\n")
    assert not stands_in("a();\n", "{\n  aa();\n}\n")
    assert shown_in("<!-- from: x.cpp -->\n```cpp\na();\n```\n") == [("x.cpp", "a();\n")]
