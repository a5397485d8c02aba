"""What every command holds to that loads a model: all of its weights, and no code of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import one_line, prune, saved_model
from edited import edit_tensors, ran, renamed, with_code, without
from models_24 import edit_json, model_24
from safetensors.torch import load_file
from streamed import tensors_of
from tiny_models import tiny_model, tiny_tokenizer

import wanda_ext
from wanda_ext import cli
from wanda_ext.checkpoint.reader import INDEX

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
K_PROK = K_PROJ.replace("k_proj", "k_prok")
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "prune": lambda src, out: prune_words(src, out),
    "prune --in-memory": lambda src, out: [*prune_words(src, out), "--in-memory"],
    "prune --gate": lambda src, out: [*prune_words(src, out), "--gate", "100"],
    "eval": lambda src, out: ["eval", str(src), "--data", str(src.parent / "text.txt")],
    "inspect --verify": lambda src, out: ["inspect", str(src), "--verify"],
    "convert": lambda src, out: ["convert", str(src), str(out), "--to", "packed"],
    "bench": lambda src, out: ["bench", str(src)],
}
LOADING = [name for name in COMMANDS if name not in ("convert", "bench")]  # these read no weights


def prune_words(src: Path, out: Path) -> list[str]:
    calib = str(src.parent / "text.txt")
    words = ["prune", str(src), "--out", str(out), "--calib", calib, "--nsamples", "4"]
    return [*words, "--seqlen", "32"]


def run(command: str, src: Path, out: Path, *more: str) -> int:
    return cli.main([*COMMANDS[command](src, out), *more])


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda src: renamed(src, K_PROJ, K_PROK), [K_PROJ, K_PROK]),
        (lambda src: without(src, K_PROJ), [K_PROJ]),
        (lambda src: without(src, "model.embed_tokens.weight"), ["model.embed_tokens.weight"]),
    ],
    ids=["renamed", "no linear", "no embedding"],
)
def test_nothing_is_made_up(
    damage: Callable[[Path], Path],
    named: list[str],
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src = damage(saved_model(tmp_path))
    before = {path.name for path in tmp_path.iterdir()}
    assert run(command, src, tmp_path / "out") == 1
    said = one_line(capsys)
    assert all(name in said for name in named)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["eval", "inspect --verify"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_nothing_of_a_packed_model_either(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = saved_model(tmp_path).with_name("packed")
    wanda_ext.save_pretrained(model_24("llama"), src, packed=True, tokenizer=tiny_tokenizer())
    assert run(command, without(src, name), tmp_path / "out") == 1
    assert name in one_line(capsys)


EXTRA = {"model.layers.3.eh_proj.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(3)}


@pytest.mark.parametrize("command", ["eval", "inspect --verify"])
def test_what_reads_says_once_what_it_ignores(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = edit_tensors(saved_model(tmp_path), lambda t: t | EXTRA)
    assert run(command, src, tmp_path / "out") == 0
    err = capsys.readouterr().err
    for name in EXTRA:
        assert err.count(name) == 1


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_writes_from_memory_carries_what_the_model_has_no_place_for(
    packed: bool, sharded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = saved_model(tmp_path), tmp_path / "out"
    words = ["--in-memory", *(["--packed"] if packed else [])]
    assert prune(src, tmp_path / "plain", *words) == 0
    edit_tensors(src, lambda t: t | EXTRA)
    if sharded:
        layout = dict.fromkeys(tensors_of(src), "model-00001-of-00001.safetensors")
        (src / "model.safetensors").rename(src / "model-00001-of-00001.safetensors")
        (src / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": layout}))
    assert prune(src, out, *words) == 0
    assert "mtp.norm.weight" in capsys.readouterr().err
    expected, found = tensors_of(tmp_path / "plain") | EXTRA, tensors_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if (out / INDEX).exists():
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"].keys() == expected.keys()
        nbytes = sum(tensor.nbytes for tensor in expected.values())
        assert index["metadata"]["total_size"] == nbytes
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
    assert run("inspect --verify", out, tmp_path) == 0
    if not packed:  # once more, from what was written
        assert prune(out, tmp_path / "again", *words) == 0
        assert tensors_of(tmp_path / "again").keys() == expected.keys()


def test_a_layer_that_the_class_leaves_out_is_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen3-Next and others do with their layers for next-token prediction: without a word."""
    kind = type(tiny_model())
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", {r"^mtp\.", r"eh_proj"})
    src = edit_tensors(saved_model(tmp_path), lambda t: t | EXTRA)
    assert prune(src, tmp_path / "out", "--in-memory") == 0
    assert tensors_of(tmp_path / "out").keys() >= EXTRA.keys()


def test_what_cannot_be_carried_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = saved_model(tmp_path)
    tensors = {**load_file(src / "model.safetensors"), **EXTRA}
    (src / "model.safetensors").unlink()
    torch.save(tensors, src / "pytorch_model.bin")
    assert prune(src, tmp_path / "out") == 1
    said = one_line(capsys)
    assert all(name in said for name in EXTRA)
    assert not (tmp_path / "out").exists()


# --- Code that came with a model ------------------------------------------------------------------


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks gets "y" from stdin, but nobody may."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))


@pytest.mark.usefixtures("says_yes")
@pytest.mark.parametrize("model", [True, False], ids=["model", "tokenizer"])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_runs_only_where_it_is_trusted(
    command: str,
    model: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads_tokenizer = command.startswith(("prune", "eval"))
    if not model and not reads_tokenizer:
        pytest.skip("it reads no tokenizer")
    monkeypatch.setattr(wanda_ext.bench, "tune", lambda *_, **__: "tuned")
    src = saved_model(tmp_path)
    if command == "convert":
        model_24("llama").save_pretrained(src)
    with_code(src, model)
    assert run(command, src, tmp_path / "out") == 1
    assert "--trust-remote-code" in one_line(capsys)
    assert not ran(src) and not (tmp_path / "out").exists()
    assert run(command, src, tmp_path / "out", "--trust-remote-code") == 0
    assert ran(src)


@pytest.mark.usefixtures("says_yes")
@pytest.mark.parametrize("to", ["packed", "dense"])
def test_code_beside_a_known_model_does_not_run(to: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    wanda_ext.save_pretrained(model_24("llama"), src, packed=to == "dense")
    with_code(src)
    edit_json(src / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    assert cli.main(["convert", str(src), str(tmp_path / "out"), "--to", to]) == 0
    assert not ran(src)
