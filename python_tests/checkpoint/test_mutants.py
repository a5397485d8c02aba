"""Damaged and hostile checkpoints: refused in one line, or taken for what they are; nothing else.

A sample of the seeds runs always, each with one command; all of them, with all, in `.ci/full`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from mutants import SPOILS, good, mutate
from sample import ALL, sampled

import wanda_ext
from wanda_ext import cli

# What was once accepted: whole numbers for floats (140, 168), swapped shards (416), a bitmap of
# another shape (729), architectures that is no list (730).
SEEDS = sampled(range(1000), 40, always=(140, 168, 416, 729, 730))
CALIB = ["--nsamples", "2", "--seqlen", "16", "--batch-size", "2"]

Result = dict[str, torch.Tensor] | str  # what a command made: tensors by name, or what it printed


@dataclass
class World:
    """Good checkpoints, and what each command makes of them."""

    folder: Path
    sources: list[Path]
    results: dict[tuple[str, str], Result]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("good")
    return World(folder, good(folder), {})


def run(*words: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = cli.main(list(words))
    return status, told.getvalue()


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """What the model computes with, unpacked."""
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    wanda_ext.unswap_linears(model)
    return dict(model.state_dict())


def is_packed(name: str) -> bool:
    return name.startswith(("packed", "records"))


# Each gives what was made of a checkpoint, or None where it was refused.


def load(src: Path, out: Path) -> Result | None:
    """from_pretrained; of dense checkpoints it is not ours."""
    if not is_packed(src.name):
        return None
    try:
        return dense(src)
    except Exception:  # of transformers, before our part begins, of any kind
        return None


def inspect(src: Path, out: Path) -> Result | None:
    status, told = run("inspect", str(src), "--verify")
    return told if status == 0 else None


def convert(src: Path, out: Path) -> Result | None:
    status, _ = run(
        "convert", str(src), str(out), "--to", "dense" if is_packed(src.name) else "packed"
    )
    return dense(out) if status == 0 else None


def prune(src: Path, out: Path, *more: str) -> Result | None:
    calib = ["--calib", str(src.parent / "text.txt"), *CALIB]
    status, _ = run("prune", str(src), "--out", str(out), "--sparsity", "2:4", *calib, *more)
    return dense(out) if status == 0 else None


def prune_in_memory(src: Path, out: Path) -> Result | None:
    return prune(src, out, "--in-memory")


def evaluate(src: Path, out: Path) -> Result | None:
    status, told = run("eval", str(src), "--data", str(src.parent / "text.txt"), "--seqlen", "64")
    return told.replace(str(src.parent), "") if status == 0 else None


COMMANDS: tuple[Callable[[Path, Path], Result | None], ...] = (
    *(load, inspect, convert, prune, prune_in_memory, evaluate),
)


def snapshot(folder: Path) -> dict[str, str]:
    """Relative path -> hash, of every file and link."""
    return {
        str(path.relative_to(folder)): (
            f"-> {path.readlink()}"
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def same(one: Result, two: Result) -> bool:
    if isinstance(one, str) or isinstance(two, str):
        return one == two
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


@pytest.mark.sampled
@pytest.mark.parametrize("seed", SEEDS)
def test_a_mutant_is_refused_or_gives_what_it_is(
    seed: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    draw = random.Random(f"commands {seed}")
    source = world.sources[seed % len(world.sources)]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_text("a secret")
    shutil.copyfile(world.folder / "text.txt", tmp_path / "text.txt")
    src, out = tmp_path / source.name, tmp_path / "out"
    shutil.copytree(source, src)
    mutant = mutate(src, seed)
    commands = [c for c in COMMANDS if not (is_packed(src.name) and "prune" in c.__name__)]
    for command in draw.sample(commands, len(commands) if ALL else 1):
        what = f"{command.__name__} of {source.name}: {mutant.told}"
        key = command.__name__, source.name
        if key not in world.results:
            result = command(source, world.folder / f"{command.__name__} {source.name}")
            if result is None:
                assert command is load, key
                continue
            world.results[key] = result
        before = snapshot(tmp_path)
        found = command(src, out)
        after = snapshot(tmp_path)
        made = {path for path in after if path not in before}
        assert all(path.startswith("out/") for path in made), (what, made)
        assert {path: after.get(path) for path in before} == before, what
        assert not any("a secret" in p.read_text(errors="ignore") for p in out.rglob("*.txt")), what
        if found is None:
            assert not out.exists() and not made, what
        elif not mutant.data:
            assert same(found, world.results[key]), f"accepted, but the result differs: {what}"
        shutil.rmtree(out, ignore_errors=True)


def test_every_way_to_spoil_is_drawn(tmp_path: Path) -> None:
    drawn = {random.Random(seed).choice(SPOILS) for seed in range(1000)}
    assert drawn == set(SPOILS)
