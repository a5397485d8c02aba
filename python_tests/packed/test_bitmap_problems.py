"""Damaged, hostile and foreign bitmaps: none is computed with, and each says what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from models_24 import dense_wide, edit_json, wide_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from wanda_ext import convert, ops
from wanda_ext.checkpoint.inspection import inspect_checkpoint
from wanda_ext.checkpoint.quantizer import WandaExtConfig
from wanda_ext.checkpoint.save import save_pretrained, swap_linears
from wanda_ext.packed.bitmap import SparseLinearBitmap, masks_problem, tensors_problem

UP = "model.layers.0.mlp.up_proj"


def packed(n: int = 40, k: int = 200, kept: float = 0.6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, k, generator=generator) < kept
    return SparseLinearBitmap.pack(weight)


def damaged(name: str, index: object, value: int) -> dict[str, torch.Tensor]:
    tensors = packed()
    tensors[name][index] = value
    return tensors


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 128), (17, 129), (40, 200), (31, 4100)])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.7])
def test_what_was_packed_has_no_problem(n, k, kept):
    weight = torch.randn(n, k) * (torch.rand(n, k) < kept)
    values, mask = ops.pack_bitmap(weight)
    assert tensors_problem({"weight": values, "mask": mask, "shape": torch.tensor([n, k])}) == ""


def test_a_surplus_has_no_problem():
    tensors = packed()
    assert "surplus_rows" in tensors and tensors_problem(tensors) == ""


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_mask_counts(bit):
    tensors = packed()
    tensors["mask"][1, 1, 7] ^= -(1 << 31) if bit == 31 else 1 << bit
    assert tensors_problem(tensors) == "has invalid masks in rows 16 to 31"


def test_a_column_twice_or_out_of_order():
    tensors = packed()
    columns = tensors["surplus_columns"]
    row = int((tensors["surplus_rows"].diff() >= 2).nonzero()[0])
    first = int(tensors["surplus_rows"][row])
    twice = {**tensors, "surplus_columns": columns.clone()}
    twice["surplus_columns"][first + 1] = columns[first]
    turned = {**tensors, "surplus_columns": columns.clone()}
    turned["surplus_columns"][first : first + 2] = columns[first : first + 2].flip(0)
    for case in (twice, turned):
        assert tensors_problem(case) == "has a surplus whose columns do not ascend in each row"


def test_a_column_that_a_mask_keeps():
    values, mask = ops.pack_bitmap(torch.ones(3, 32).tril(8))
    tensors = {"weight": values, "mask": mask, "shape": torch.tensor([3, 32])}
    lists = {
        "surplus_rows": torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        "surplus_values": torch.ones(1),
    }
    kept = mask[0, 0, 8].item()  # of row 1: lane 4, half 0
    for column in range(32):
        columns = torch.tensor([column], dtype=torch.int16)
        found = tensors_problem({**tensors, **lists, "surplus_columns": columns})
        expected = "has a surplus at columns that its masks keep" if kept >> column & 1 else ""
        assert found == expected


def test_weights_in_the_padding():
    tensors = packed()
    for n, k in ((39, 200), (40, 199), (33, 130)):
        changed = {**tensors, "shape": torch.tensor([n, k])}
        for name in ("surplus_rows", "surplus_columns", "surplus_values"):
            del changed[name]
        assert tensors_problem(changed) == f"has weights outside of its shape [{n}, {k}]"


@pytest.mark.parametrize("shape", [[-1, 200], [40, 300], [60, 200]])
def test_another_shape(shape):
    tensors = packed() | {"shape": torch.tensor(shape)}
    assert tensors_problem(tensors).startswith(f"tells of a weight of shape {shape}, its mask")


# --- In checkpoints and modules -------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_pretrained(wide_model("50%"), tmp_path / "model", packed=True)
    return tmp_path / "model"


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_model_of_another_shape_does_not_load(tmp_path):
    save_pretrained(wide_model("16:32"), tmp_path / "model", packed=True)
    edit_json(tmp_path / "model" / "config.json", intermediate_size=511)
    with pytest.raises(ValueError, match=r"_proj holds a weight of shape \[512, 256\], its module"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_of_another_shape_does_not_load(assign):
    torch.manual_seed(0)
    linear = nn.Linear(200, 32)
    linear.weight.data[:, ::2] = 0
    whole = SparseLinearBitmap.from_dense(linear)
    other = SparseLinearBitmap(190, 30)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \[32, 200\], here \[30, 19"):
        other.load_state_dict(whole.state_dict(), assign=assign)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [0, 1, 0xFFFF, 0x1FFFF << 15 & 0xFFFFFFFF, 0xFFFFFFFF])
def test_a_mask_of_other_than_16_bits_does_not_load(bits, assign):
    linear = nn.Linear(200, 40)
    linear.weight.data[:, ::2] = 0
    whole = SparseLinearBitmap.from_dense(linear)
    other = SparseLinearBitmap(200, 40)
    state = whole.state_dict()
    state["mask"] = state["mask"].clone()
    state["mask"][2, 1, 5] = bits - (1 << 32) if bits >> 31 else bits
    if bits == 0xFFFF:
        other.load_state_dict(state, assign=assign)
        return
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match="the bitmap has invalid masks in rows 32 to 47"):
        other.load_state_dict(state, assign=assign)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    parent = nn.Sequential(other)
    with pytest.raises(RuntimeError, match="0 has invalid masks in rows 32 to 47"):
        parent.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_product_is_that_of_the_unpacked_weight(share):
    """With masks of exactly 16 bits, the padding's and those filled up included."""
    for n, k in ((1, 1), (17, 31), (40, 200), (48, 384)):
        generator = torch.Generator().manual_seed(n)
        weight = torch.randn(n, k, generator=generator)
        weight *= torch.rand(n, k, generator=generator) < share
        values, mask = ops.pack_bitmap(weight)
        assert masks_problem(mask) == ""
        unit = torch.eye(k)  # y[:, r] is row r of W, exactly
        product = ops.linear_bitmap(unit, values, mask, n)
        assert torch.equal(product.t(), ops.unpack_bitmap(values, mask, n, k))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t[f"{UP}.mask"].fill_(-1), "has invalid masks in rows 0 to 15"),
        (lambda t: t[f"{UP}.shape"].copy_(torch.tensor([500, 250])), "has weights outside"),
        (
            lambda t: t[f"{UP}.surplus_columns"].fill_(3),
            "has a surplus whose columns do not ascend",
        ),
    ],
)
def test_damaged_bits_are_refused_everywhere(edit, told, saved, tmp_path):
    edit_tensors(saved, edit)
    found = rf"up_proj ({told}|is packed as another shape than Llama).*; copy or download"
    with pytest.raises(ValueError, match=found):
        convert(saved, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(ValueError, match=told):
        inspect_checkpoint(saved)
    with pytest.raises(ValueError, match=r"up_proj (has|holds) "):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "dtype", "told"),
    [
        ("shape", torch.float32, r"up_proj\.shape is F32; expected I64"),
        ("surplus_columns", torch.int32, r"up_proj\.surplus_columns is I32; expected I16"),
        ("surplus_rows", torch.int64, r"up_proj\.surplus_rows is I64; expected I32"),
        ("weight", torch.int32, r"up_proj\.weight is I32; expected F32 or BF16 or F16"),
        ("surplus_values", torch.float32, r"up_proj\.surplus_values is F32; expected BF16"),
    ],
)
def test_other_dtypes_are_refused(name, dtype, told, saved):
    edit_tensors(saved, lambda t: t.update({f"{UP}.{name}": t[f"{UP}.{name}"].to(dtype)}))
    for read in (inspect_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=told):
            read(saved)


@pytest.mark.parametrize("entry", [{UP: "many"}, [UP], {UP: 0.5}, {UP: -1}, "many", {UP: True}])
def test_hostile_configs_are_refused(entry):
    with pytest.raises(ValueError, match="a `bitmap` that is not names and numbers"):
        WandaExtConfig(["a"], bitmap=entry)


def test_packed_values_are_frozen():
    model = dense_wide()
    linear = model.get_submodule(UP)
    linear.weight.data[:, ::2] = 0
    linear.weight.data[0, :64] = 1
    swap_linears(model, UP)
    module = model.get_submodule(UP)
    assert not module.surplus_values.requires_grad
    module.surplus_values.requires_grad_()
    with pytest.raises(ValueError, match="packed weights have no gradient"):
        module(torch.ones(1, 256))
