"""The journal: steps, locks, differences; and runs that die at any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import python_options
from tiny_models import tiny_model
from transformers import LlamaForCausalLM

from wanda_ext.stream.journal import Journal

ASKED = {"seed": 0, "of": {"a": "2:4", "b": "2:4"}}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "dst")


def begun(journal: Journal) -> None:
    """A run that ended after its first step."""
    with journal.opened(resume=True):
        journal.ask(ASKED)
        (journal.checkpoint / "file").write_text("content")
        journal.done("first", size=7)


def test_steps_survive(journal: Journal) -> None:
    begun(journal)
    again = Journal(journal.final)
    with again.opened(resume=True):
        again.ask(ASKED)
        assert again.find("first") == {"step": "first", "size": 7}
        assert again.find("second") is None
        again.finish()
    assert sorted(path.name for path in journal.final.iterdir()) == ["file", "wanda_ext.json"]
    assert [path.name for path in journal.final.parent.iterdir()] == ["dst"]


def test_a_line_that_was_cut_is_not_a_step(journal: Journal) -> None:
    begun(journal)
    with (journal.home / "journal.jsonl").open("a") as file:
        file.write('{"step": "sec')
    with journal.opened(resume=True):
        journal.ask(ASKED)
        journal.done("second")
    lines = (journal.home / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ["asked", "first", "second"]


def test_damage_is_told(journal: Journal) -> None:
    begun(journal)
    path = journal.home / "journal.jsonl"
    path.write_text("{" + path.read_text())
    with pytest.raises(ValueError, match=r"damaged.*resume=False"), journal.opened(resume=True):
        pytest.fail("opened")
    with journal.opened(resume=False):
        journal.ask(ASKED)


def test_the_difference_is_named(journal: Journal) -> None:
    begun(journal)
    other = {"seed": 1, "of": {"a": "2:4", "b": "50%"}, "new": [1, 2]}
    told = r"seed \(0 then, 1 now\); of b \('2:4' then, '50%' now\); new \(None then, \[1, 2\]"
    with pytest.raises(ValueError, match=told), journal.opened(resume=True):
        journal.ask(other)
    with journal.opened(resume=True):  # nothing was lost
        journal.ask(ASKED)
        assert journal.find("first")
    with journal.opened(resume=False):
        journal.ask(other)
        assert journal.find("first") is None
        assert list(journal.checkpoint.iterdir()) == []


def test_nothing_stays_of_a_run_without_a_step(journal: Journal) -> None:
    with pytest.raises(KeyError), journal.opened(resume=True):
        journal.ask(ASKED)
        raise KeyError
    assert list(journal.final.parent.iterdir()) == []


def test_one_run_at_a_time(journal: Journal) -> None:
    begun(journal)
    with journal.opened(resume=True):
        other = Journal(journal.final)
        with pytest.raises(ValueError, match="another run is writing"), other.opened(True):
            pytest.fail("opened twice")
        assert journal.find("first")
    with other.opened(resume=True):
        assert other.find("first")


def test_foreign_files_are_refused_first(journal: Journal) -> None:
    journal.final.mkdir()
    (journal.final / "precious").touch()
    with pytest.raises(ValueError, match="precious"), journal.opened(resume=True):
        pytest.fail("opened")
    assert [path.name for path in journal.final.parent.iterdir()] == ["dst"]


# --- Runs that die (python_tests/killed.py) ------------------------------------------------------


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: LlamaForCausalLM = tiny_model()
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    folder = tmp_path_factory.mktemp("models") / "two"
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def deaths(src: Path, work: Path, case: str, **options: object) -> int:
    """How many of the case's processes died; each of its checks holds."""
    script = Path(__file__).parents[1] / "killed.py"
    command = [sys.executable, str(script), str(src), str(work), case, json.dumps(options)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, check=False, **python_options()
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("states", ["memory", "files"])
def test_a_kill_at_any_step(two_blocks: Path, tmp_path: Path, states: str) -> None:
    assert deaths(two_blocks, tmp_path / "w", "every step", states=states) >= 60


@pytest.mark.slow
def test_kills_at_random_moments(two_blocks: Path, tmp_path: Path) -> None:
    assert deaths(two_blocks, tmp_path / "w", "any moment", packed=True) >= 20


@pytest.mark.slow
def test_a_full_disk(two_blocks: Path, tmp_path: Path) -> None:
    assert deaths(two_blocks, tmp_path / "w", "full disk", states="files") == 4
