"""`wanda-ext prune` on a directory: block by block where that can be, and what it says."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import one_line, prune, saved_model, weights
from tiny_models import tiny_tokenizer

import wanda_ext
from wanda_ext import cli
from wanda_ext.files import shards
from wanda_ext.report import page
from wanda_ext.report.commands import reproduce_command
from wanda_ext.report.report import PruneReport
from wanda_ext.runner.capture import GlueError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models"))


def test_directories_are_pruned_block_by_block(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(saved, tmp_path / "files", "--states", "files") == 0
    assert "Pruned block by block; saved dense" in capsys.readouterr().out
    assert prune(saved, tmp_path / "memory", "--in-memory") == 0
    assert "Pruned in memory; saved dense" in capsys.readouterr().out
    expected = weights(tmp_path / "memory")
    for name, parameter in weights(tmp_path / "files").items():
        assert torch.equal(parameter, expected[name]), name


def test_the_update_is_the_same_block_by_block_and_in_memory(saved: Path, tmp_path: Path) -> None:
    for name, words in (("files", ()), ("memory", ("--in-memory",)), ("plain", None)):
        update = () if words is None else ("--update", "corrected", *words)
        assert prune(saved, tmp_path / name, *update) == 0
    files, memory, plain = (weights(tmp_path / name) for name in ("files", "memory", "plain"))
    assert all(torch.equal(tensor, memory[name]) for name, tensor in files.items())
    assert not all(torch.equal(tensor, plain[name]) for name, tensor in files.items())
    told = PruneReport.load(tmp_path / "files" / "report.json").arguments["update"]
    assert told == repr(wanda_ext.Corrected())


def test_windows_start_as_the_model_expects(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several sources, in every part of a prune; and the printed command does the same."""
    src = tmp_path / "src"
    shutil.copytree(saved, src)
    tiny_tokenizer(bos=True).save_pretrained(src)
    text = saved.parent / "text.txt"
    other = tmp_path / "a=b.txt"
    other.write_text(text.read_text()[::-1])
    words = ["--calib", f"{text}=3", "--calib", f"{other}=1", "--nsamples", "4", "--seqlen", "32"]

    def pruned(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / name
        assert cli.main(["prune", str(src), "--out", str(out), *words, *more]) == 0
        return {**PruneReport.load(out / "report.json").arguments, "weights": weights(out)}

    model = pruned("model", "--in-memory", "--repair", "--gate", "100")
    told = model["protocol"], model["calib"]
    assert told == ("model", [[str(text), 3.0], [str(other), 1.0]])
    paper = pruned("paper", "--protocol", "paper")
    files = pruned("files")
    assert paper["protocol"] == "paper"
    alike = [torch.equal(t != 0, files["weights"][n] != 0) for n, t in paper["weights"].items()]
    assert not all(alike)
    command = reproduce_command(PruneReport.load(tmp_path / "paper" / "report.json"))
    again = shlex.split(command)[1:]
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(again) == 0
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, paper["weights"][name]), name


def test_what_cannot_go_block_by_block_goes_in_memory(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def glued(*_: Any) -> None:
        raise GlueError("glue between blocks")

    monkeypatch.setattr("wanda_ext.runner.walk.capture", glued)
    assert prune(saved, tmp_path / "out") == 0
    told = capsys.readouterr()
    assert "pruning in memory, for the blocks of LlamaForCausalLM cannot run alone" in told.err
    assert "Pruned in memory" in told.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_restart_begins_anew(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = "wanda_ext.stream.writer.write_shard"
    plain = shards.write_shard

    def full(path: Path, *rest: Any, **named: Any) -> shards.Written:
        if path.name == "model.layers.1.safetensors":
            raise OSError("No space left on device")
        return plain(path, *rest, **named)

    monkeypatch.setattr(writer, full)
    assert prune(saved, tmp_path / "out") == 1
    assert "No space left" in one_line(capsys)
    monkeypatch.undo()
    assert prune(saved, tmp_path / "out", "--seed", "1") == 1
    assert "seed (0 then, 1 now)" in one_line(capsys)
    assert prune(saved, tmp_path / "out", "--seed", "1", "--restart") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_processes_do_not_share_what_is_in_memory(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert prune(saved, tmp_path / "out", "--in-memory") == 1
    assert "only where it goes block by block" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def report_of(out: Path) -> PruneReport:
    return PruneReport.load(out / "report.json")


@pytest.mark.parametrize("memory", [False, True])
def test_a_report_and_its_page_lie_beside_the_model(
    saved: Path, tmp_path: Path, memory: bool
) -> None:
    out = tmp_path / "out"
    words = ["--in-memory"] if memory else []
    assert prune(saved, out, "--packed", *words) == 0
    report = report_of(out)
    assert (out / "report.html").read_text(encoding="utf-8") == page.html(report)
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert report.saved == {"directory": str(out), "packed": True, "bytes": nbytes}
    assert report.gate == report.repair == {}
    assert {"calibration", "blocks"} <= report.timings.keys()
    assert {row["path"] for row in report.kernels} == {"cpu"}
    words = shlex.split(reproduce_command(report))[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert cli.main(words) == 0
    again = weights(tmp_path / "again")
    for name, parameter in weights(out).items():
        assert torch.equal(parameter, again[name]), name


def test_a_gate_that_fails_writes_nothing(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(saved, tmp_path / "out", "--sparsity", "90%", "--gate", "1.0001") == 1
    told = capsys.readouterr()
    assert "pruning in memory, for --gate" in told.err
    assert "wanda-ext: the gate does not hold: perplexity" in told.err
    assert "gate fails" in told.out
    assert list(tmp_path.iterdir()) == []
    assert prune(saved, tmp_path / "out", "--gate", "0.5") == 1
    assert "max_ratio is a perplexity" in one_line(capsys)


def test_fallback_makes_the_gate_hold(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--sparsity", "2:4", "--packed", "--gate", "1.001", "--fallback"]
    assert prune(saved, out, *words) == 0
    report = report_of(out)
    restored = report.gate["restored"]
    assert report.gate["passed"] and restored and "gate holds" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(restored) <= set(config["dense"]) and not set(restored) & set(config["modules"])
    dense = weights(saved)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name in restored:
        assert torch.equal(model.get_submodule(name).weight, dense[f"{name}.weight"])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in text for name in restored)
    assert cli.main(["inspect", str(out), "--verify"]) == 0


def test_what_cannot_be_packed_is_refused_before_work(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanda_ext, "prune_model", lambda *_, **__: pytest.fail("pruned first"))
    assert prune(saved, tmp_path / "out", "--sparsity", "20%", "--packed", "--gate") == 1
    assert "at least 30% is pruned can be packed" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_repair_comes_before_the_gate(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prune(saved, out, "--sparsity", "60%", "--repair", "--gate", "100") == 0
    report = report_of(out)
    assert [block["name"] for block in report.repair["blocks"]] == [
        f"model.layers.{i}" for i in range(3)
    ]
    order = list(report.timings)
    assert order.index("blocks") < order.index("repair") < order.index("gate")
    assert prune(saved, tmp_path / "plain", "--sparsity", "60%", "--in-memory") == 0
    name = "model.layers.1.mlp.up_proj.weight"
    one, other = weights(out)[name], weights(tmp_path / "plain")[name]
    assert torch.equal(one == 0, other == 0) and not torch.equal(one, other)


@pytest.mark.parametrize("words", [["prune", "--in-memory"], ["prune"], ["eval"], ["inspect"]])
def test_no_link_is_followed_out_of_the_directory(
    saved: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(saved, own)
    (own / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (own / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    calib = str(saved.parent / "text.txt")
    more = {
        "prune": ["--out", str(tmp_path / "out"), "--calib", calib],
        "eval": ["--data", calib],
        "inspect": ["--verify"],
    }
    assert cli.main([words[0], str(own), *words[1:], *more[words[0]]]) == 1
    assert "tokenizer.json is a link to" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_left_is_told(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(saved, own)
    (tmp_path / "secret").write_text("secret")
    (own / "notes.md").symlink_to("../secret")
    (own / "modeling.py").write_text("code")
    for name, words in (("files", []), ("memory", ["--in-memory"])):
        assert prune(own, tmp_path / name, "--method", "magnitude", *words) == 0
        out = capsys.readouterr().out
        assert "not taken along: modeling.py (code" in out and "notes.md (a link" in out
        assert report_of(tmp_path / name).left.keys() == {"modeling.py", "notes.md"}
    prune(own, tmp_path / "packed", "--method", "magnitude", "--packed")
    capsys.readouterr()
    (tmp_path / "packed" / "extra.py").write_text("code")
    assert (
        cli.main(["convert", str(tmp_path / "packed"), str(tmp_path / "d"), "--to", "dense"]) == 0
    )
    assert "not taken along: extra.py (code" in capsys.readouterr().out
