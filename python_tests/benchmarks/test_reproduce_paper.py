"""benchmarks/reproduce_paper.py: its table, and the whole way of a row on a tiny saved model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, tiny_model, tiny_tokenizer

import reproduce_paper
import wanda_ext
from paper_rows import EVIDENCE, ROWS, Row
from wanda_ext.methods import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    wanda_ext.save_pretrained(tiny_model(), folder / "model", tokenizer=tiny_tokenizer())
    (folder / "text.txt").write_text(" ".join(f"word{i} of line {i % 7}" for i in range(200)))
    return folder


def toy_row(folder: Path, published: str | None, **changes: Any) -> Row:
    text = str(folder / "text.txt")
    row = Row("toy", str(folder / "model"), CONTEXT, "wanda", "2:4", published, "a test", "read")
    return dataclasses.replace(row, calib=text, nsamples=4, data=text, dtype="float32", **changes)


def expected(folder: Path, sparsity: str | None) -> float:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = folder / "text.txt"
    if sparsity is not None:
        options: dict[str, Any] = {"nsamples": 4, "seqlen": CONTEXT, "progress": False}
        wanda_ext.prune_model(model, str(text), sparsity, tokenizer=tokenizer, **options)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)
    return wanda_ext.perplexity(model, ids, CONTEXT)


def test_a_row_runs_the_whole_way(folder: Path, capsys: Any) -> None:
    ours = expected(folder, "2:4")
    dense = toy_row(folder, f"{expected(folder, None):.2f}", method="dense", sparsity=None)
    rows = [dense, toy_row(folder, f"{ours * 1.015:.2f}")]
    out = folder / "results.json"
    words = ["--row", "toy-*", "--model", str(folder / "model"), "--json", str(out)]
    assert reproduce_paper.main(words, rows) == 0
    results = json.loads(out.read_text())
    assert [result["row"] for result in results] == ["toy-dense", "toy-wanda-2:4"]
    assert results[1]["ours"] == pytest.approx(ours, rel=1e-6)
    assert results[1]["verdict"] == "within tolerance"
    assert [len(result["commands"]) for result in results] == [1, 2]
    assert results[1]["evaluation"]["perplexity"]["seqlen"] == CONTEXT
    printed = capsys.readouterr().out
    assert f"toy-wanda-2:4: ours {ours:.2f}, published {ours * 1.015:.2f} (a test; read)" in printed


def test_a_figure_that_is_missed_says_by_how_much(folder: Path, capsys: Any) -> None:
    ours = expected(folder, "2:4")
    row = toy_row(folder, f"{ours / 1.1:.2f}")
    out = folder / "kept"
    assert reproduce_paper.main(["--row", row.name, "--out", str(out)], [row]) == 1
    assert ": off by +" in capsys.readouterr().out
    assert (out / "toy-wanda-2of4" / "config.json").is_file()
    verdict = reproduce_paper.compared(toy_row(folder, "10.00"), 11.0)["verdict"]
    assert verdict == "off by +1.00 (+10.0%)"
    assert reproduce_paper.compared(toy_row(folder, "10.00"), float("nan"))["verdict"] != verdict
    assert reproduce_paper.compared(toy_row(folder, None), 11.0)["verdict"] == reproduce_paper.NONE


def test_tolerance_knows_the_digits_that_were_printed(folder: Path) -> None:
    wanted = {"10.00": 0.205, "193.": 4.36, "1.7e4": 840.0}
    for figure, tolerance in wanted.items():
        assert toy_row(folder, figure).tolerance == pytest.approx(tolerance)
    dense = toy_row(folder, "10.00", method="dense", sparsity=None)
    assert dense.tolerance == pytest.approx(0.055)


def test_the_table_is_whole() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    figures = {row.name: row.published for row in ROWS}
    assert figures["llama2-7b-wanda-2:4"] == "11.02"
    assert figures["llama-13b-wanda-50%"] == "6.15"
    assert figures["opt-6.7b-sparsegpt-50%"] == "11.55"
    assert figures["bloom-176b-sparsegpt-2:4"] == "9.20"
    assert figures["pythia-12b-wanda-50%"] is None
    for row in ROWS:
        assert row.method in ("dense", *METHODS)
        assert (row.published is None) == (row.source is None) == (row.evidence is None)
        if row.published is not None:
            assert row.evidence in EVIDENCE.values() and row.tolerance > 0 and row.source
    unverified = {row.name for row in ROWS if row.evidence == "unverified"}
    assert "llama-7b-wanda-4:8" in unverified and "llama-7b-wanda-2:4" not in unverified


def test_list_shows_rows_and_commands(capsys: Any) -> None:
    assert reproduce_paper.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS)
    assert any(reproduce_paper.NONE in line for line in lines)
    words = ["--list", "--row", "llama2-7b-wanda-2:4", "--model", "weights", "--device", "cuda"]
    assert reproduce_paper.main(words) == 0
    row, prune, evaluate = capsys.readouterr().out.splitlines()
    assert "11.02" in row and "seqlen 4096" in row and "(read)" in row
    assert prune.split()[:3] == ["wanda-ext", "prune", "weights"]
    for option in ("--method wanda", "--sparsity 2:4", "--calib c4", "--nsamples 128"):
        assert option in prune
    assert "--seqlen 4096" in prune and "--seqlen 4096" in evaluate and "--device cuda" in evaluate


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--row", "gpt5-*"], "no such row"),
        (["--row", "llama*-7b-dense", "--model", "x"], "rows are of several"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        reproduce_paper.main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_a_command_that_fails_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = argparse.Namespace(model="nowhere", device=None, eval_device=None)
    with pytest.raises(SystemExit) as stopped:
        reproduce_paper.reproduce(toy_row(folder, None), arguments, tmp_path)
    assert stopped.value.code == 1
