"""report.html: what stands in it, that it is escaped, and its commands."""

from __future__ import annotations

import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
from command_line import prune
from models_24 import dense_wide, wide_model
from pages import NASTY, large_report, linears, small_report
from streamed import tensors_of
from tiny_models import tiny_tokenizer

import wanda_ext
from wanda_ext.cli.main import _parser
from wanda_ext.methods import METHODS, Corrected, get_method
from wanda_ext.packed.formats import FORMATS
from wanda_ext.report import page
from wanda_ext.report.commands import load_command, measure_command, reproduce_command
from wanda_ext.report.plots import heat_map
from wanda_ext.report.report import LinearReport, PruneReport
from wanda_ext.report.saved import note_saved
from wanda_ext.report.sizes import whole_bytes, written_bytes
from wanda_ext.report.tables import size
from wanda_ext.report.words import METHOD_WORDS, lead


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_words(name: str):
    report = PruneReport(arguments={"method": repr(get_method(name)), "sparsity": "2:4"})
    assert lead(report).startswith(f"{METHOD_WORDS[name]} at 2:4")


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
    closed = [text for text in parsed.text if text.startswith("All ")]
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


def test_saving_enters_what_was_written(tmp_path: Path):
    model = wide_model("mixed", "llama")
    modules = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    report = PruneReport(
        [LinearReport(n, tuple(m.weight.shape), "bfloat16", "50%", 0.5) for n, m in modules.items()]
    )
    report.linears[0].name = "an expert"  # which is no module
    wanda_ext.save_pretrained(model, tmp_path, packed=True)
    written = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of something else")
    note_saved(report, tmp_path, Path("final name"), packed=True)
    kinds = ["" if "q_proj" in n else "2:4" if "mlp" in n else "bitmap" for n in modules]
    assert [line.stored for line in report.linears] == kinds and len(kinds) == 7
    assert report.swap == (
        "saved 6 of 7 pruned linears packed; an expert: a part of a fused weight, which stays dense"
    )
    assert report.saved == {"directory": "final name", "packed": True, "bytes": sum(written)}
    assert PruneReport.load(tmp_path / "report.json") == report
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.html(report)
    assert not list(tmp_path.glob(".*.partial"))


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
    assert written_bytes(report.linears) == sum(line.stored_bytes for line in report.linears)
    before, after = (
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (tmp_path / "dense", out)
    )
    dense, saved = whole_bytes(report)
    assert saved == after < before and abs(dense - before) < 16384  # headers
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert report.model_weights == model.num_parameters() and report.shared == []
    runs = {(row["m"], row["path"]) for row in report.kernels}
    assert runs == {(1, "cpu"), (8, "cpu"), (2048, "cpu")} or torch.cuda.is_available()


def test_commands_are_those_of_the_command_line():
    report = small_report()
    words = shlex.split(reproduce_command(report))
    assert words[0] == "wanda-ext"
    asked = _parser().parse_args(words[1:])
    assert (asked.model, asked.out, asked.calib) == (NASTY, "out dir", "builtin")
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
