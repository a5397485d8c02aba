"""Parsing and matching of sparsities."""

from __future__ import annotations

import pytest
from torch import nn

from wanda_ext.methods.sparsity import (
    NM,
    Unstructured,
    check_globs,
    matches,
    parse_sparsity,
    sparsity_for,
    spec_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0.0)),
        ("0.5", Unstructured(0.5)),
        (" 62.5% ", Unstructured(0.625)),
        ("2:4", NM(2, 4)),
        ("16:32", NM(16, 32)),
        ("4:4", NM(4, 4)),
        (NM(1, 4), NM(1, 4)),
    ],
)
def test_parses_and_prints(text, expected):
    assert parse_sparsity(text) == expected
    assert parse_sparsity(str(expected)) == expected


@pytest.mark.parametrize("value", [1, 1.0, -0.1, "100%", "1", float("nan")])
def test_ratio_outside_zero_to_one(value):
    with pytest.raises(ValueError, match="up to but not including 1"):
        parse_sparsity(value)


@pytest.mark.parametrize("value", ["0:4", "5:4", "-1:4", "2:64"])
def test_groups_that_cannot_be(value):
    with pytest.raises(ValueError, match=r"0 < keep <= group <= 32.*" + value):
        parse_sparsity(value)


@pytest.mark.parametrize("value", ["half", "2:4:8", "a:b", "", "%"])
def test_text_that_is_no_sparsity(value):
    with pytest.raises(ValueError, match="is no sparsity: pass "):
        parse_sparsity(value)


@pytest.mark.parametrize("value", [None, True, [0.5]])
def test_other_types(value):
    with pytest.raises(TypeError, match="must be a number, a string or a Sparsity"):
        parse_sparsity(value)


def test_counts_truncate_the_float_product():
    assert Unstructured(0.29).n_prune(100) == 28  # 0.29 * 100 is 28.999...
    assert Unstructured(0.6).n_prune(64) == 38
    assert NM(1, 4).keep_fraction == 0.25
    assert Unstructured(0.75).keep_fraction == 0.25


def test_group_that_does_not_divide_names_the_module():
    NM(4, 8).check("layers.0.fc", 3, 64)
    Unstructured(0.5).check("layers.0.fc", 3, 5)
    with pytest.raises(ValueError, match=r"layers\.0\.fc has 36 input features.*4:8"):
        NM(4, 8).check("layers.0.fc", 3, 36)


def test_globs_match_names_and_what_holds_them():
    assert matches("*.mlp.*", "layers.0.mlp.up")
    assert matches("layers.0", "layers.0.mlp.up")
    assert not matches("layers.0", "layers.01.mlp.up")
    check_globs(["*.up", "layers.0"], ["layers.0.mlp.up"], "ignore glob")
    with pytest.raises(ValueError, match=r"ignore glob 'lm_haed' matches no module.*lm_head"):
        check_globs(["lm_haed"], ["lm_head"], "ignore glob")


def test_spec_forms():
    module = nn.Linear(4, 4)
    mapping = {"*.mlp.*": None, "layers.0.*": "2:4", "layers.*": 0.5}
    assert sparsity_for("4:8", "x", module) == NM(4, 8)
    assert sparsity_for(NM(4, 8), "x", module) == NM(4, 8)
    assert sparsity_for(mapping, "layers.0.mlp.up", module) is None
    assert sparsity_for(mapping, "layers.0.attn.q", module) == NM(2, 4)
    assert sparsity_for(mapping, "layers.1.attn.q", module) == Unstructured(0.5)
    assert sparsity_for(mapping, "head", module) is None
    by_width = lambda name, linear: 0.5 if linear.in_features == 4 else None  # noqa: E731
    assert sparsity_for(by_width, "x", module) == Unstructured(0.5)
    assert sparsity_for(by_width, "x", nn.Linear(5, 4)) is None
    assert spec_text(mapping) == "*.mlp.*: None, layers.0.*: 2:4, layers.*: 0.5"
    assert spec_text(0.5) == "50%"
    assert "lambda" in spec_text(by_width)
