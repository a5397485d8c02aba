"""wanda-ext eval: what it prints and writes, on saved models dense, masked and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import three_forms, write_tasks
from tiny_models import CONTEXT, tiny_model, tiny_tokenizer

import wanda_ext
from wanda_ext import cli
from wanda_ext.cli import eval as cli_eval
from wanda_ext.quality import tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models dense, masked and packed, a text, and tasks."""
    folder = tmp_path_factory.mktemp("eval")
    for name, model in three_forms().items():
        wanda_ext.save_pretrained(
            model, folder / name, packed=name == "packed", tokenizer=tiny_tokenizer()
        )
    (folder / "text.txt").write_text(" ".join(f"word{i} of line {i % 7}" for i in range(200)))
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


def evaluated(folder: Path, name: str, *words: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    assert cli.main(["eval", str(folder / name), *words, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_perplexity_and_all_it_depends_on(folder: Path, capsys: Any) -> None:
    text = folder / "text.txt"
    written = evaluated(folder, "dense", "--data", str(text))
    printed = capsys.readouterr().out
    ids = torch.tensor(tiny_tokenizer()(text.read_text()).input_ids)
    expected = wanda_ext.perplexity(tiny_model(), ids, CONTEXT)
    windows = ids.numel() // CONTEXT
    assert printed.startswith(f"perplexity {expected:.4f} ")
    assert f"{windows} windows of {CONTEXT} tokens" in printed
    found = written["perplexity"]
    assert found["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert (found["seqlen"], found["windows"], found["tokens"]) == (CONTEXT, windows, ids.numel())
    assert found["revision"].startswith("sha256 ") and found["revision"] in printed
    assert written["versions"]["torch"] == torch.__version__ and "tasks" not in written


def test_seqlen_and_dtype_are_taken(folder: Path) -> None:
    words = ["--data", str(folder / "text.txt"), "--seqlen", "16", "--dtype", "bfloat16"]
    found = evaluated(folder, "dense", *words)["perplexity"]
    assert (found["seqlen"], found["dtype"]) == (16, "bfloat16")


def test_windows_and_protocol_are_taken(folder: Path, capsys: Any) -> None:
    words = ["--data", str(folder / "text.txt"), "--windows", "2", "--protocol", "paper"]
    found = evaluated(folder, "dense", *words)["perplexity"]
    assert (found["windows"], found["protocol"], found["starts_with"]) == (2, "paper", [])
    told = capsys.readouterr()
    assert "protocol   paper: windows of the text" in told.out
    assert "evaluating: 100%" in told.err
    assert cli.main(["eval", str(folder / "dense"), *words[:3], "0"]) == 1
    assert "--windows: expected a number from 1 on, got 0" in capsys.readouterr().err


def test_one_command_for_dense_masked_and_packed(folder: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    words = ["--tasks", "toy_choice,toy_text", "--task-path", str(folder / "tasks")]
    words += ["--data", str(folder / "text.txt")]
    found = {name: evaluated(folder, name, *words) for name in ("dense", "masked", "packed")}
    printed = capsys.readouterr().out
    assert printed.count("toy_choice") == printed.count("acc_norm") == 3
    dense, masked, packed = ([s["scores"] for s in f["tasks"]["scores"]] for f in found.values())
    assert masked[0] == packed[0] != dense[0]  # acc, acc_norm
    assert masked[1] == pytest.approx(packed[1], rel=1e-5)
    values = [f["perplexity"]["perplexity"] for f in found.values()]
    assert values[1] == pytest.approx(values[2], rel=1e-5) and values[0] != values[1]


def test_tasks_alone_measure_no_perplexity(folder: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    report = tasks.TaskReport((), 3, "auto", {"lm_eval": "0"})
    monkeypatch.setattr(tasks, "find", lambda *given, **named: seen.append((given, named)) or "x")
    monkeypatch.setattr(
        tasks, "run", lambda *given, **named: seen.append((given[2], named)) or report
    )
    words = ["--tasks", "paper", "--num-fewshot", "2", "--limit", "3", "--batch-size", "auto"]
    written = evaluated(folder, "dense", *words)
    assert "perplexity" not in written and written["tasks"]["limit"] == 3
    assert seen[0] == (("paper",), {"num_fewshot": 2, "task_path": None})
    assert seen[1] == ("x", {"limit": 3, "batch_size": "auto"})


def test_device_auto_and_trust_reach_transformers(folder: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []

    def load(arguments: Any, **options: Any) -> Any:
        seen.append((arguments.trust_remote_code, options))
        return tiny_model(), tiny_tokenizer(), []

    monkeypatch.setattr(cli_eval, "load", load)
    words = ["--data", str(folder / "text.txt"), "--device"]
    evaluated(folder, "dense", *words, "auto", "--trust-remote-code")
    evaluated(folder, "dense", *words, "cpu")
    assert seen == [(True, {"device_map": "auto"}), (False, {})]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "2"], "--limit: expected --tasks beside it"),
        (["--num-fewshot", "2", "--task-path", "x"], "--task-path, --num-fewshot: expected"),
        (["--tasks", "paper", "--seqlen", "16"], "no perplexity is measured; add --data"),
        (["--data", "builtin", "--json", "nowhere/out.json"], "nowhere/out.json does not exist"),
        (["--tasks", ","], "expected names such as 'paper'"),
        (["--data", "nowhere.txt"], "got 'nowhere.txt'"),
    ],
)
def test_refused_before_a_model_is_loaded(words: Any, said: str, capsys: Any) -> None:
    assert cli.main(["eval", "no-such-model", *words]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("size", ["0", "fast", "-1"])
def test_a_wrong_batch_size_is_wrong_usage(size: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "model", "--tasks", "paper", f"--batch-size={size}"])
    assert stopped.value.code == 2 and "from 1 on, or auto" in capsys.readouterr().err
