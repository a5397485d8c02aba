"""report.html: what stands in it, that it is escaped, and its commands."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from command_line import prune
from models_24 import dense_wide
from pages import NASTY, large_report, small_report
from streamed import tensors_of
from tiny_models import tiny_tokenizer

from wanda_ext.cli.main import _parser
from wanda_ext.methods import Corrected
from wanda_ext.packed.formats import FORMATS
from wanda_ext.report import page
from wanda_ext.report.page import load_command, measure_command, reproduce_command
from wanda_ext.report.report import PruneReport
from wanda_ext.report.saved import note_saved


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
    assert {line.name for line in report.linears} <= pieces
    assert {"12.5 → 13.25", "1.06 times the dense one, on 4,096 held-out tokens"} <= pieces
    assert {"The gate holds.", "restored by the gate", "2.1.0", "phase", "1.50 s"} <= pieces
    assert text.count("not measured") >= 2  # of the packed kernels' times


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


def test_saving_enters_what_was_written(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1234)
    report = small_report()
    config = {"modules": [report.linears[0].name], "bitmap": {report.linears[1].name: 7}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    note_saved(report, tmp_path, Path("final name"), packed=True)
    n, k = report.linears[0].shape
    assert [line.stored for line in report.linears[:3]] == ["2:4", "bitmap", ""]
    assert report.linears[0].stored_bytes == n * k // 2 * 2 + n * k // 8
    n, k = report.linears[1].shape
    records = n * k // 32
    assert report.linears[1].stored_bytes == records * 36 + 16 + 4 * (n + 1) + 7 * 4
    dense = sum(2 * line.weights for line in report.linears[2:])
    stored = report.linears[0].stored_bytes + report.linears[1].stored_bytes
    assert page.written_bytes(report) == stored + dense
    assert report.saved == {"directory": "final name", "packed": True, "bytes": 1234}
    assert PruneReport.load(tmp_path / "report.json") == report
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.html(report)


@pytest.mark.parametrize("where", [[], ["--in-memory"]])
@pytest.mark.parametrize(
    ("sparsity", "stored"), [("16:32", {"bitmap"}), ("0.5", {"bitmap"}), ("2:4", {"2:4"})]
)
def test_bytes_of_packed_linears_are_those_of_the_files(
    sparsity: str, stored: set[str], where: list[str], tmp_path: Path
):
    dense_wide(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("a line of text " * 40)
    out = tmp_path / "out"
    assert prune(tmp_path / "dense", out, "--sparsity", sparsity, "--packed", *where) == 0
    report, tensors = PruneReport.load(out / "report.json"), tensors_of(out)
    assert len(report.linears) == 7 and {line.stored for line in report.linears} == stored
    for line in report.linears:
        names = {f"{line.name}.{part}" for kind in FORMATS for part in kind.TENSORS}
        assert line.stored_bytes == sum(tensors[name].nbytes for name in names & tensors.keys())
    assert page.written_bytes(report) == sum(line.stored_bytes for line in report.linears)
    assert report.saved["bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    runs = {(row["m"], row["path"]) for row in report.kernels}
    assert runs == {(1, "cpu"), (8, "cpu"), (2048, "cpu")} or torch.cuda.is_available()


def test_commands_are_those_of_the_command_line():
    report = small_report()
    words = shlex.split(reproduce_command(report))
    assert words[0] == "wanda-ext"
    asked = _parser().parse_args(words[1:])
    assert (asked.model, asked.out, asked.calib) == (NASTY, "out dir", [("builtin", 1.0)])
    assert (asked.sparsity, asked.method, asked.nsamples, asked.seed) == ("2:4", "wanda", 16, 3)
    assert (asked.gate, asked.fallback, asked.repair) == (1.1, True, True)
    assert asked.packed and asked.ignore == ["*.a b"]
    assert shlex.split(measure_command(report))[:3] == ["wanda-ext", "eval", NASTY]
    assert asked.update is None
    report.arguments["update"] = repr(Corrected())
    again = _parser().parse_args(shlex.split(reproduce_command(report))[1:])
    assert again.update == "corrected"
    compile(load_command(report), "load", "exec")
    assert "import wanda_ext" in load_command(report) and "'out dir'" in load_command(report)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("calib", "Tensor"),
        ("sparsity", "*.q: 2:4"),
        ("method", "Magnitude(scope='row')"),
        ("update", "Corrected(ridge=1)"),
    ],
)
def test_what_no_command_can_name_is_told(word, value):
    report = small_report()
    report.arguments[word] = value
    assert reproduce_command(report).startswith(f"# No command can name {word}={value}")
