"""Words for what a report keeps as Python writes it."""

from __future__ import annotations

import pytest

from wanda_ext.methods import METHODS, UPDATES, Corrected, Magnitude, get_method, get_update
from wanda_ext.report.report import PruneReport
from wanda_ext.report.words import METHOD_WORDS, about_update, asked_for, lead


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_words(name: str):
    report = PruneReport(arguments={"method": repr(get_method(name)), "sparsity": "2:4"})
    assert lead(report).startswith(f"{METHOD_WORDS[name]} at 2:4")
    assert asked_for(report)["method"] == name


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_has_words(name: str):
    report = PruneReport(arguments={"method": "?", "update": repr(get_update(name))})
    assert lead(report) == f"? at ?, then {name}: running"
    assert asked_for(report)["update"] == name
    assert about_update(report).lower().startswith(name)


def test_other_options_are_shown_as_they_are():
    made, update = Magnitude(scope="row"), Corrected(ridge=1.0)
    report = PruneReport(
        arguments={"method": repr(made), "sparsity": "2:4", "update": repr(update)}
    )
    assert lead(report) == f"{made} at 2:4, then {update}: running"
    assert asked_for(report) == {"method": repr(made), "sparsity": "2:4", "update": repr(update)}


def test_values_are_written_as_one_would_say_them():
    given = {
        "seqlen": None,
        "ignore": [],
        "swap": False,
        "packed": True,
        "tokens": [1, 8],
        "seed": 0,
    }
    told = ["not given", "not given", "no", "yes", "1, 8", "0"]
    assert [*asked_for(PruneReport(arguments=given)).values()] == told
