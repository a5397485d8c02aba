"""Where the examples of the documents run: a folder with the model they name, and its texts.

A directory stands where the documents name a model of the Hub, so transformers takes that. In place
of data sets of the Hub, which no test may ask, there is a text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from local_tasks import write_tasks
from tiny_models import tiny_model, tiny_tokenizer

MODEL = "Qwen/Qwen3-0.6B"
HUB = ("allenai/c4", "Salesforce/wikitext")


def make_world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the folder and goes there: MODEL, text.txt, tasks/, and bin/, the first of PATH."""
    tiny_model("qwen3").save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)
    texts = [" ".join(f"word{i * j % 97} of {i}" for j in range(9)) for i in range(200)]
    (folder / "text.txt").write_text("\n\n".join(texts[:80]))
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")

    def load_dataset(*given: Any, **options: Any) -> Any:
        if not given or given[0] not in HUB:
            return of_files(*given, **options)
        rows = texts[:10] if options["split"] == "test" else texts
        found = datasets.Dataset.from_dict({"text": rows})
        return found.to_iterable_dataset() if options.get("streaming") else found

    of_files = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _install_commands(folder / "bin", monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(folder)


def _install_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of this interpreter and of the wanda_ext that is tested."""
    program = "import sys; from wanda_ext.cli import main; sys.exit(main())"
    words = {
        "python": "",
        "wanda-ext": f"-c '{program}'",
        "torchrun": "-m torch.distributed.run --standalone",
    }
    folder.mkdir()
    for name, options in words.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
