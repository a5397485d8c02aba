"""Several processes: the same bits as one, under torchrun; and what each of them owns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_python import python_options
from streamed import assert_same_tensors, saved

from wanda_ext.stream.ranks import Ranks, device_of_rank, joined, launched

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
import wanda_ext
from tiny_models import padded_batches
torch.set_num_threads(1)
src, dst, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
wanda_ext.prune_checkpoint(src, dst, padded_batches(), progress=False, **options)
"""


def launch(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs SCRIPT in one process or, by torchrun, in several."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{SCRIPT}")
    command = [sys.executable]
    if processes > 1:
        run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", *run]
    return subprocess.run(
        [*command, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **python_options(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("llama", "sparsegpt"), ("bloom", "wanda")])
def test_the_same_bits_as_one_process(family: str, method: str, tmp_path: Path) -> None:
    src = saved(tmp_path / "src", family)
    for processes, own in ((1, {}), (2, {}), (3, {"states": "files", "packed": True})):
        dst, options = tmp_path / str(processes), {"method": method, **own}
        result = launch(tmp_path, processes, str(src), str(dst), repr(options))
        assert result.returncode == 0, result.stderr
    assert_same_tensors(tmp_path / "1", tmp_path / "2")
    packed = launch(
        tmp_path, 1, str(src), str(tmp_path / "packed"), repr({**options, "states": "memory"})
    )
    assert packed.returncode == 0, packed.stderr
    assert_same_tensors(tmp_path / "packed", tmp_path / "3")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_what_one_refuses_all_refuse(tmp_path: Path) -> None:
    src = saved(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").touch()
    result = launch(tmp_path, 2, str(src), str(tmp_path / "dst"), "{}")
    assert result.returncode != 0
    assert result.stderr.count("precious") >= 2  # one of each process
    result = launch(tmp_path, 4, str(src), str(tmp_path / "other"), "{}")
    assert "4 ranks share 3 batches" in result.stderr
    assert not (tmp_path / "other").exists()


def test_batches_are_dealt_out() -> None:
    ranks = Ranks()
    ranks.count = 3
    dealt = []
    for ranks.rank in range(3):
        dealt.append(ranks.own([0, 1, 2, 3, 4]))
    assert dealt == [[0, 3], [1, 4], [2]]
    with pytest.raises(ValueError, match="3 ranks share 2 batches"):
        ranks.own([0, 1])


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched()
    with joined() as ranks:
        assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)
        assert ranks.at_first(lambda: 5) == 5
        ranks.wait()
        with pytest.raises(KeyError):
            ranks.at_first(lambda: {}[0])


def test_every_process_of_a_node_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of_rank("cuda") == "cuda"
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert device_of_rank("cuda") == "cuda:1"
    assert device_of_rank(torch.device("cuda")) == "cuda:1"
    assert device_of_rank("cuda:3") == "cuda:3"
    assert device_of_rank(None) is None
