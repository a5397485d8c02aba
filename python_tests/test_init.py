"""What `import wanda_ext` gives, and what it must not drag in."""

from __future__ import annotations

from pathlib import Path

from fresh_python import run_python

import wanda_ext


def printed_by(code: str) -> str:
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_exported_name_is_there() -> None:
    assert sorted(set(wanda_ext.__all__)) == sorted(wanda_ext.__all__)
    for name in wanda_ext.__all__:
        assert getattr(wanda_ext, name) is not None


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    code = """
import wanda_ext.prune.verify, wanda_ext.checkpoint.convert, wanda_ext.packed.explain, wanda_ext.cli
from wanda_ext import *
print(callable(verify), callable(convert), callable(explain), callable(bench.tune))
"""
    assert printed_by(code) == "True True True True"


def test_import_is_light() -> None:
    code = """
import torch, transformers.quantizers.auto, sys
before = set(sys.modules)
import wanda_ext
heavy = ("datasets", "matplotlib", "pandas", "lm_eval", "peft", "tokenizers.implementations")
print(sorted(name for name in heavy if name in set(sys.modules) - before))
"""
    assert printed_by(code) == "[]"


def test_import_asks_no_gpu_and_reads_no_table(tmp_path: Path) -> None:
    code = f"""
import os
os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}
import torch, transformers.quantizers.auto
import wanda_ext
from wanda_ext.packed import dispatch
print(torch.cuda.is_initialized(), dispatch._tables)
"""
    assert printed_by(code) == "False {}"


def test_import_registers_the_quantizer() -> None:
    code = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
assert "wanda_ext" not in known
import wanda_ext
print(known["wanda_ext"].__name__)
"""
    assert printed_by(code) == "WandaExtQuantizer"


def test_build_info_is_the_modules() -> None:
    info = wanda_ext.build_info()
    assert info["version"] == wanda_ext.__version__
    assert info["compiled"] is not None
