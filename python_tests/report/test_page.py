"""report.html: what stands in it, and that it is escaped."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

from pages import NASTY, large_report, linears, small_report

from wanda_ext.methods import Corrected
from wanda_ext.report import page
from wanda_ext.report.plots import heat_map
from wanda_ext.report.report import PruneReport
from wanda_ext.report.sizes import whole_bytes
from wanda_ext.report.tables import size


class Text(HTMLParser):
    """Counts tags and collects text; void and SVG tags may close themselves."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_asks_for_nothing():
    text = page.html(small_report())
    parsed = Text(text)
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.tags.count("table") >= 5 and parsed.tags.count("svg") == 5
    assert not re.findall(r"(?:https?:)?//[a-z]", text)
    assert "default-src 'none'" in text


def test_text_is_escaped():
    text = page.html(small_report())
    assert NASTY not in text and "<b>" not in text
    assert any(NASTY in piece for piece in Text(text).text)


def test_every_linear_and_figure_is_there():
    report = small_report()
    text = page.html(report)
    pieces = set(Text(text).text)
    assert report.runner not in pieces and "Each block ran by itself." in pieces
    assert {line.name for line in report.linears} <= pieces
    assert {"12.5 → 13.25", "1.06 times the dense one, on 4,096 held-out tokens"} <= pieces
    assert {"The gate holds.", "restored by the gate", "2.1.0", "phase", "1.50 s"} <= pieces
    assert text.count("not measured") >= 2  # of the packed kernels' times


def text_of(report: PruneReport) -> str:
    """What a reader sees, with a space between the pieces."""
    return " ".join(" ".join(Text(page.html(report)).text).split())


def test_words_are_plain():
    report = small_report()
    report.arguments |= {"tokens": [1, 8], "packed": True, "device": None}
    told = text_of(report)
    assert "Wanda at 2:4: complete." in told and "Corrected" not in told
    assert "Wanda(" not in told and "None" not in told and "False" not in told
    assert "method wanda" in told and "tokens 1, 8" in told and "swap no" in told
    report.arguments["update"] = repr(Corrected())
    told = text_of(report)
    assert "Wanda at 2:4, then corrected: complete." in told and "update corrected" in told
    assert "make up for what pruning did" in told
    report.arguments["update"] = repr(Corrected(ridge=1.0))
    assert "then Corrected(ridge=1.0, " in text_of(report)


def test_what_a_model_writes_stands_side_by_side():
    report = small_report()
    told = text_of(report)
    assert "What it writes dense Once <upon> a time pruned Once <upon> & again dense Two" in told
    report.continuations = {"left_out": "it takes <long>"}
    assert "What it writes Left out: it takes <long>." in text_of(report)
    report.continuations = {}
    assert "What it writes" not in text_of(report)


def test_what_was_left_is_named():
    report = small_report()
    assert "Not taken along file why old.bin weights in another form" in text_of(report)
    report.left = {}
    assert "Not taken along" not in text_of(report)


def test_a_constant_is_a_sentence_and_no_map():
    report = PruneReport(linears(4))
    assert "Share of zeros: 50.00% in every linear." in text_of(report)
    assert Text(page.html(report)).tags.count("svg") == 1
    report.linears[0].reached = 0.5002  # as where the dense weights hold a few zeros
    assert "Share of zeros: 50.00% to 50.02% in every linear." in text_of(report)
    report.linears[0].reached = 0.49
    assert Text(page.html(report)).tags.count("svg") == 2


def test_maps_of_what_is_not_finite():
    assert "not finite in every linear" in heat_map("Error", "", {"a.0.q": math.inf})
    assert "0.00% in every linear" in heat_map("Error", "", {"a.0.q": 0.0, "a.1.q": 0.0})
    one = heat_map("Error", "", {"a.0.q": 0.5, "a.1.q": math.nan})
    assert "block 1, q: not finite" in one and "block 0, q: 50.00%" in one


def test_the_whole_model_stands_beside_the_linears():
    report = small_report()
    weights = [line.weights for line in report.linears]
    for line in report.linears:
        line.stored_bytes = line.weights * 9 // 8
    dense, saved = 2 * sum(weights), 9 * sum(weights) // 8
    assert whole_bytes(report) == (2 * 10**9 - saved + dense, 2 * 10**9)
    told = text_of(report)
    restored = report.linears[6].weights
    part = f"pruned linears {(sum(weights) - restored) / 1e6:,.1f} M 50.00%"
    assert part in told and "56.25%" in told
    assert f"{size(2 * 10**9)} of {size(2 * 10**9 - saved + dense)} dense, the whole model" in told
    assert "whole model 1,000.0 M" in told and "head.weight is embed.weight" in told
    assert "Saved dense" not in told
    report.saved["packed"] = False
    assert "Saved dense, zeros take as much space" in text_of(report)


def test_long_tables_are_closed():
    parsed = Text(page.html(small_report()))
    closed = [text for text in parsed.text if re.match(r"All \d", text)]
    assert closed == ["All 21 linears"]
    parsed = Text(page.html(large_report()))
    assert {"All 560 linears", "All 80 blocks"} <= set(parsed.text)
    assert "<details open" not in page.html(large_report())


def test_what_is_not_known_is_said():
    text = page.html(PruneReport(arguments={"model": "m", "sparsity": "50%"}))
    assert "not measured" in text and "not saved by this prune" in text
    assert "No linear was reached." in text
    assert "svg" not in Text(text).tags


def test_large_models_stay_small():
    report = large_report()
    text = page.html(report)
    assert len(report.linears) == 560 and len(text.encode()) < 1_000_000
    assert sum(line.name in text for line in report.linears) == 560


def test_a_page_can_be_made_again(tmp_path: Path):
    report = small_report()
    report.save(tmp_path / "report.json")
    page.write(PruneReport.load(tmp_path / "report.json"), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.html(report)
