"""Bytes as saved, and dense, are those of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from command_line import prune
from models_24 import dense_wide
from streamed import tensors_of
from tiny_models import tiny_tokenizer

from wanda_ext.packed.formats import FORMATS
from wanda_ext.report.report import PruneReport
from wanda_ext.report.sizes import whole_bytes, written_bytes


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
