"""The commands on the page are those of the command line, or it says why there is none."""

from __future__ import annotations

import shlex

import pytest
from pages import NASTY, small_report

from wanda_ext.cli.main import _parser
from wanda_ext.methods import Corrected
from wanda_ext.report.commands import load_command, measure_command, reproduce_command


def test_commands_are_those_of_the_command_line():
    report = small_report()
    words = shlex.split(reproduce_command(report))
    assert words[0] == "wanda-ext"
    asked = _parser().parse_args(words[1:])
    assert (asked.model, asked.out, asked.calib) == (NASTY, "out dir", [("builtin", 1.0)])
    assert (asked.sparsity, asked.method, asked.nsamples, asked.seed) == ("2:4", "wanda", 16, 3)
    assert (asked.gate, asked.fallback, asked.repair) == (1.1, True, True)
    assert asked.packed and asked.ignore == ["*.a b"]
    assert shlex.split(measure_command(report))[:3] == ["wanda-ext", "eval", NASTY]
    assert asked.update is None
    report.arguments["update"] = repr(Corrected())
    again = _parser().parse_args(shlex.split(reproduce_command(report))[1:])
    assert again.update == "corrected"
    report.arguments["calib"] = [["a b.txt", 3.0], ["c4", 0.5]]
    again = _parser().parse_args(shlex.split(reproduce_command(report))[1:])
    assert again.calib == [("a b.txt", 3.0), ("c4", 0.5)]
    compile(load_command(report), "load", "exec")
    assert "import wanda_ext" in load_command(report) and "'out dir'" in load_command(report)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("calib", "Tensor"),
        ("sparsity", "*.q: 2:4"),
        ("method", "Magnitude(scope='row')"),
        ("update", "Corrected(ridge=1)"),
    ],
)
def test_what_no_command_can_name_is_told(word, value):
    report = small_report()
    report.arguments[word] = value
    assert reproduce_command(report).startswith(f"# No command can name {word}={value}")
