"""Helpers for tests of the command line: a saved model, its text, and `wanda-ext prune` on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model, tiny_tokenizer

from wanda_ext import cli


def saved_model(folder: Path, **options: Any) -> Path:
    """The directory of a dense model; text.txt, to calibrate on, lies beside it."""
    directory = folder / "dense"
    tiny_model().save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    text = " ".join(f"word{i} of line {i % 7}" for i in range(200))
    (folder / "text.txt").write_text(text)
    return directory


def prune(saved: Path, out: Path, *more: str) -> int:
    """The exit status."""
    calib = str(saved.parent / "text.txt")
    options = ["--calib", calib, "--nsamples", "4", "--seqlen", "32", *more]
    return cli.main(["prune", str(saved), "--out", str(out), *options])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return dict(model.named_parameters())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """All that wanda-ext said of an error."""
    err = capsys.readouterr().err.splitlines()
    said = [line for line in err if line.startswith("wanda-ext: ")]
    assert len(said) == 1 and "Traceback" not in "".join(err), err
    return said[0]
