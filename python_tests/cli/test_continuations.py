"""Two prompts continued for the page of a prune: when, by which model, and that no prune fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import one_line, prune, saved_model
from tiny_models import tiny_tokenizer

from wanda_ext import cli
from wanda_ext.cli import continuations as made
from wanda_ext.quality import continuations

STREAMED = "the model was pruned block by block, and never loaded whole"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models"))


def found_in(out: Path) -> Any:
    report = json.loads((out / "report.json").read_text())
    assert ("continuations" in report["timings"]) == ("texts" in report["continuations"])
    return report["continuations"]


@pytest.mark.parametrize("where", [[], ["--in-memory"], ["--in-memory", "--packed"]])
def test_each_model_writes_its_own(saved: Path, tmp_path: Path, where: list[str]) -> None:
    out = tmp_path / "out"
    assert prune(saved, out, "--sparsity", "2:4", "--continuations", *where) == 0
    texts = found_in(out)["texts"]
    assert [text["prompt"] for text in texts] == [*made.PROMPTS]
    for name, folder in (("dense", saved), ("pruned", out)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = continuations(model, tiny_tokenizer())
        assert [text[name] for text in texts] == expected, name
    assert texts[0]["dense"] != texts[0]["pruned"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What it writes" in page and "continuations" in page


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--in-memory"], "they would take long beside a prune that reads 128 tokens"),
        (["--in-memory", "--method", "magnitude"], "the method runs no text through the model"),
        ([], STREAMED),
    ],
)
def test_left_out_where_they_cost_too_much(
    saved: Path, tmp_path: Path, words: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "continuations", lambda *_: pytest.fail("it was run"))
    assert prune(saved, tmp_path / "out", *words) == 0
    told = f"{why}; --continuations asks for it"
    assert found_in(tmp_path / "out") == {"left_out": told}
    assert f"Left out: {told}." in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert prune(saved, tmp_path / "out", *words, "--no-continuations") == 0
    assert found_in(tmp_path / "out") == {"left_out": "--no-continuations"}


def test_made_unasked_where_they_cost_little(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "ENOUGH", 4 * 32)
    assert prune(saved, tmp_path / "out", "--in-memory") == 0
    assert len(found_in(tmp_path / "out")["texts"]) == 2
    assert prune(saved, tmp_path / "out", "--in-memory", "--device", "cpu") == 0
    assert "not on cpu" in found_in(tmp_path / "out")["left_out"]


@pytest.mark.parametrize("where", [[], ["--in-memory"]])
def test_no_prune_fails_for_them(
    saved: Path, tmp_path: Path, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def second_fails(*_: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("no such cache")
        return ["a", "b"]

    monkeypatch.setattr(made, "continuations", second_fails)
    assert prune(saved, tmp_path / "out", "--continuations", *where) == 0
    assert found_in(tmp_path / "out") == {"left_out": "KeyError: 'no such cache'"}


@pytest.mark.parametrize("where", [[], ["--in-memory"]])
def test_ctrl_c_says_that_the_model_is_written(
    saved: Path,
    tmp_path: Path,
    where: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(model: Any, _: Any) -> list[str]:
        if (model.get_parameter("model.layers.0.mlp.up_proj.weight") == 0).any():  # it is pruned
            raise KeyboardInterrupt
        return ["a", "b"]

    monkeypatch.setattr(made, "continuations", interrupt)
    out = tmp_path / "out"
    assert prune(saved, out, "--continuations", *where) == 130
    assert f"interrupted, the pruned model is in {out}" in one_line(capsys)
    assert cli.main(["inspect", str(out), "--verify"]) == 0
