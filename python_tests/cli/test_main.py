"""The command line: its words, its files, its errors and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import one_line, prune, saved_model, weights
from tiny_models import tiny_model, tiny_tokenizer

import wanda_ext
from wanda_ext import bench, cli
from wanda_ext.cli import demo
from wanda_ext.packed.dispatch_table import BUCKETS
from wanda_ext.report.report import PruneReport


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models"))


def test_prune_does_what_the_api_does(saved: Path, tmp_path: Path) -> None:
    assert prune(saved, tmp_path / "out", "--sparsity", "50%", "--ignore", "*.o_proj") == 0
    model = tiny_model()
    wanda_ext.prune_model(
        model,
        str(saved.parent / "text.txt"),
        "50%",
        tokenizer=tiny_tokenizer(),
        nsamples=4,
        seqlen=32,
        ignore=["*.o_proj"],
        progress=False,
    )
    written = weights(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written[name]), name
    report = PruneReport.load(tmp_path / "out" / "report.json")
    assert len(report.pruned) == 3 * 6
    assert report.arguments["sparsity"] == "50%"
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_magnitude_needs_no_text(saved: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = ["--method", "magnitude", "--dtype", "bfloat16", "--sparsity", "2:4"]
    assert cli.main(["prune", str(saved), "--out", out, *options]) == 0
    zeros = weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"] == 0
    assert (zeros.reshape(-1, 4).sum(dim=1) == 2).all()


def test_packed_inspect_and_convert(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    assert prune(saved, packed, "--packed") == 0
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]
    capsys.readouterr()
    assert cli.main(["inspect", str(packed), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "2:4 packed" in out and out.splitlines()[-1] == "ok"
    assert "up_proj (3)" in out and "model.layers.0.mlp.up_proj" not in out
    assert cli.main(["inspect", str(packed), "--verify", "--all"]) == 0
    assert capsys.readouterr().out.count("model.layers.0.mlp.up_proj") == 2
    assert cli.main(["convert", str(packed), str(dense), "--to", "dense"]) == 0
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert cli.main(["inspect", str(dense), "--verify"]) == 0
    assert "50.00%  2:4 " in capsys.readouterr().out
    assert cli.main(["convert", str(packed), str(dense), "--to", "packed"]) == 1
    assert "is packed already" in one_line(capsys)


def test_inspect_finds_damage(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(saved, tmp_path / "out", "--sparsity", "2:4") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 1.0
    model.save_pretrained(tmp_path / "out")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out"), "--verify"]) == 1
    assert "model.layers.1.mlp.up_proj" in one_line(capsys)


def test_bench_tunes_what_it_is_told(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    table = bench.Tuning((), ("nothing",))
    monkeypatch.setattr(
        bench, "tune", lambda *given, **named: calls.append((given, named)) or table
    )
    words = ["--tokens", "1,2048", "--dtype", "float16", "--device", "cuda:1"]
    assert cli.main(["bench", "--shapes", "4096x1024,64x32", *words]) == 0
    assert cli.main(["bench", str(saved)]) == 0
    (first, options), (second, defaults) = calls
    assert first == ([(4096, 1024), (64, 32)], [1, 2048])
    assert options == {"dtype": torch.float16, "device": "cuda:1"}
    model, tokens = second
    assert tokens == BUCKETS and defaults == {"dtype": None, "device": None}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.is_meta and weight.shape == (96, 64)  # nothing was read
    assert capsys.readouterr().out.splitlines()[-1] == "left out: nothing"


def test_demo_takes_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(demo, "run", lambda *given, **named: calls.append((given, named)))
    assert cli.main(["demo", "--out", str(tmp_path), "--seed", "3", "--retrain"]) == 0
    (((out, settings), named),) = calls
    assert (out, settings.seed, named) == (tmp_path, 3, {"retrain": True})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "MODEL", "--out", "OUT", "--sparsity", "1.5"], "sparsity ratio"),
        (["prune", "MODEL", "--out", "OUT", "--calib", "TEXT", "--seqlen", "65"], "context of 64"),
        (["prune", "MODEL", "--out", "OUT", "--calib", "TEXT", "--ignore", "*.none"], "'*.none'"),
        (["prune", "MODEL", "--out", "OUT", "--sparsity", "20%", "--packed"], "at least 30%"),
        (["prune", "nowhere", "--out", "OUT"], "nowhere"),
        (["eval", "MODEL", "--data", "nowhere.txt"], "nowhere.txt"),
        (["eval", "MODEL", "--data", "TEXT", "--seqlen", "65"], "context of 64"),
        (["inspect", "nowhere"], "nowhere"),
        (["bench", "nowhere"], "nowhere"),
        (["bench", "--shapes", "64x64"], "torch sees none"),
        (["convert", "nowhere", "OUT", "--to", "packed"], "nowhere"),
    ],
)
def test_user_errors_are_one_line(
    words: list[str],
    said: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"MODEL": saved, "OUT": tmp_path / "out", "TEXT": saved.parent / "text.txt"}
    assert cli.main([str(names.get(word, word)) for word in words]) == 1
    assert said in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_output_directory_is_checked_first(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr(wanda_ext, "prune_model", lambda *_, **__: pytest.fail("pruned first"))
    assert prune(saved, tmp_path) == 1
    assert "precious.txt" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_prunes_into_its_own_directory_again(saved: Path, tmp_path: Path) -> None:
    assert prune(saved, tmp_path / "out", "--sparsity", "2:4") == 0
    assert prune(saved, tmp_path / "out", "--sparsity", "50%") == 0
    assert PruneReport.load(tmp_path / "out" / "report.json").arguments["sparsity"] == "50%"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["prune", "MODEL"],
        ["convert", "a", "b"],
        ["eval", "a", "--dtype", "int8"],
        ["bench"],
        ["bench", "a", "--shapes", "64x64"],
        ["bench", "--shapes", "64"],
        ["bench", "--shapes", "64x64", "--tokens", "1,-2"],
        ["bench", "--shapes", "64x64", "--dtype", "float32"],
    ],
)
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: wanda-ext" in capsys.readouterr().err


def test_ctrl_c_says_what_was_done(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wanda_ext.stream.run.prune_block", interrupt)
    assert prune(saved, tmp_path / "out") == 130
    said = one_line(capsys)
    assert "interrupted, nothing was written; until then: " in said
    assert "0 of " in said
    assert list(tmp_path.iterdir()) == []
