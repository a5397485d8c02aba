"""Code in a fresh interpreter that imports the same wanda_ext as the tests do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import wanda_ext


def python_options() -> dict[str, Any]:
    """For subprocess: away from the sources, which would hide what is installed."""
    paths = [str(Path(wanda_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {"cwd": tempfile.gettempdir(), "env": environment}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code; output and errors are text."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **python_options()
    )
