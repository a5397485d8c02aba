"""verify finds every kind of damage, and nothing in a sound model."""

from __future__ import annotations

import pytest
import torch
from models_24 import CONFIGS, dense_model, model_24, wide_model
from torch import nn

from wanda_ext.checkpoint.save import swap_linears
from wanda_ext.prune.verify import verify
from wanda_ext.report.report import LinearReport, PruneReport

UP = "model.layers.0.mlp.up_proj"


def report(asked: str = "2:4", reached: float = 0.5, name: str = UP) -> PruneReport:
    linear = LinearReport(name, (128, 64), "float32", asked, reached)
    return PruneReport([linear, LinearReport("left", (1, 1), "float32", None, 0.0, "ignored")])


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_sound_model(family, swapped):
    model = model_24(family)
    if swapped:
        swap_linears(model)
    found = verify(model)
    assert found.ok and found.raise_if_bad() is None
    linears = {linear.name: linear for linear in found.linears}
    head = linears.pop("lm_head")
    assert head.pattern in ("dense", "unstructured") and not head.packed
    assert {(x.pattern, x.packed) for x in linears.values()} == {("2:4", swapped)}
    assert all(x.zeros == x.shape[0] * x.shape[1] // 2 for x in linears.values())
    table = str(found).splitlines()
    assert table[0].split() == ["linear", "shape", "stored", "pattern", "zeros"]
    assert table[1].split()[2:] == ["packed" if swapped else "dense", "2:4", "50.00%"]
    assert len(table) == len(found.linears) + 2 and table[-1] == "ok"


def test_a_dense_model_is_sound_too():
    found = verify(dense_model("llama"))
    assert found.ok and {linear.pattern for linear in found.linears} == {"dense"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finds_nan_and_infinity(value, swapped):
    model = model_24("llama")
    if swapped:
        swap_linears(model)
    weight = model.get_submodule(UP).weight.data
    weight[weight != 0] = torch.where(torch.arange(128 * 32) < 3, value, weight[weight != 0])
    found = verify(model)
    assert found.problems == (f"{UP} has 3 NaN or infinite weights",)
    with pytest.raises(ValueError, match=f"verify: {UP} has 3 NaN"):
        found.raise_if_bad()
    assert str(found).endswith(f"bad: {UP} has 3 NaN or infinite weights")


@pytest.mark.parametrize("word", [0x4440, 0x4544, 0x1444, 0x4F44 - 0x10000 + 0x10000])
def test_finds_invalid_metadata(word):
    model = model_24("llama")
    swap_linears(model)
    model.get_submodule(UP).meta[5, 1] = word
    assert verify(model).problems == (f"{UP} has invalid metadata in row 5",)


def test_a_verdict_is_short():
    model = model_24("llama")
    assert verify(model).verdict().splitlines() == ["15 linears checked", "ok"]
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data[0] = float("nan")
    told = verify(model).verdict().splitlines()
    assert len(told) == 7 and told[1].startswith("bad: ") and told[-1] == "and 9 more"


def test_every_valid_metadata_word_passes():
    model = model_24("llama")
    swap_linears(model)
    nibbles = [low | high << 2 for high in range(4) for low in range(high)]
    words = torch.tensor([[a << 12 | b << 8 | b << 4 | a] for a in nibbles for b in nibbles])
    model.get_submodule(UP).meta[:36, :1] = words.to(torch.int16)
    assert verify(model).ok


def test_agrees_with_a_true_report():
    assert verify(model_24("llama"), report()).ok


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (report("60%", 0.6), f"{UP} has 4096 zeros, 4915 when it was pruned"),
        (report("1:4", 0.5), f"{UP} is not 1:4, which it was pruned to"),
        (report("2:5", 0.5), f"{UP} is not 2:5, which it was pruned to"),
        (report(name="gone"), "gone is in the report, but not in the model"),
    ],
)
def test_finds_what_contradicts_the_report(given, problem):
    assert verify(model_24("llama"), given).problems == (problem,)


def test_weights_that_are_not_in_memory():
    assert verify(nn.Sequential(nn.Linear(16, 16, device="meta"))).problems == (
        "0 is not in memory (meta device)",
    )


# --- Bitmaps --------------------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj"  # 256 x 512


def wide_swapped(pattern):
    model = wide_model(pattern)
    swap_linears(model)
    return model


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("16:32", {"16:32"}), ("50%", {"unstructured"}), ("mixed", {"2:4", "unstructured"})],
)
def test_sound_bitmaps(pattern, told):
    found = verify(wide_swapped(pattern))
    assert found.ok
    linears = [linear for linear in found.linears if linear.name != "lm_head"]
    assert {linear.pattern for linear in linears} == told
    assert all(x.packed and x.zeros == x.shape[0] * x.shape[1] // 2 for x in linears)


def _set(name, index, value):
    def damage(module):
        getattr(module, name).data[index] = value

    return damage


def _flip(module):
    module.mask[3, 1, 7] ^= 1 << 31


OUTSIDE = "has a surplus that points outside of the weight"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_flip, "has invalid masks in rows 48 to 63"),
        (_set("mask", (0, 0, 0), -1), "has invalid masks in rows 0 to 15"),
        (_set("surplus_columns", -1, 512), OUTSIDE),
        (_set("surplus_columns", 0, -1), OUTSIDE),  # 65535
        (_set("surplus_rows", 0, 1), OUTSIDE),
        (_set("surplus_rows", 7, 0), OUTSIDE),
        (_set("surplus_rows", -1, 1 << 20), OUTSIDE),
        (_set("surplus_rows", -1, 7), OUTSIDE),
        (_set("shape", 1, 511), "holds a weight of shape [256, 511], its module one of [256, 512]"),
        (_set("surplus_values", 5, float("inf")), "has 1 NaN or infinite weights"),
    ],
)
def test_finds_damage_of_a_bitmap(damage, problem):
    model = wide_swapped("50%")
    assert verify(model).ok
    damage(model.get_submodule(DOWN))
    assert verify(model).problems == (f"{DOWN} {problem}",)


def test_a_bitmap_that_contradicts_its_report():
    model = wide_swapped("16:32")
    linear = LinearReport(DOWN, (256, 512), "bfloat16", "16:32", 0.5)
    assert verify(model, PruneReport([linear])).ok
    swap_linears(other := wide_model("50%"))
    assert verify(other, PruneReport([linear])).problems == (
        f"{DOWN} is not 16:32, which it was pruned to",
    )


def test_a_dtype_that_no_kernel_reads_and_an_empty_linear():
    model = nn.ModuleDict(
        {"wide": wide_swapped("16:32").get_submodule(DOWN), "empty": nn.Linear(8, 0)}
    )
    found = verify(model.double())
    assert found.problems == ("wide is torch.float64, which no kernel reads",)
    assert "0x8" in str(found)
