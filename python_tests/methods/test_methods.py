"""Which weights each method takes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import changed, tiny_model, token_ids, weights_of

import original
from wanda_ext import reference
from wanda_ext.methods import METHODS, Magnitude, Wanda, get_method
from wanda_ext.methods.sparsity import NM, Sparsity, Unstructured
from wanda_ext.methods.statistic import InputStatistic
from wanda_ext.prune.prune import prune_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def random_norm() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(1)).exp()


def pruned(method, weight, sparsity, norm=None):
    weight, bad = weight.clone(), torch.tensor([7], dtype=torch.int32)
    inputs = None if norm is None else InputStatistic(norm.double().square(), 1)
    method.prune_(weight, sparsity, inputs, bad)
    return weight, int(bad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wanda_scores_by_weight_times_norm(dtype):
    weight, norm = random_weight(dtype), random_norm()
    score = weight.float().abs() * norm
    rows, bad = pruned(Wanda(), weight, Unstructured(0.6), norm)
    kept = torch.ones_like(score, dtype=torch.bool)
    kept.scatter_(1, score.argsort(dim=1, stable=True)[:, : int(64 * 0.6)], False)
    assert torch.equal(rows, weight * kept)
    assert bad == -1
    groups, bad = pruned(Wanda(), weight, NM(2, 4), norm)
    expected = weight.clone()
    reference.prune_nm_(expected, norm, 2, 4)
    assert torch.equal(groups, expected)
    assert bad == -1


def test_wanda_needs_a_norm():
    with pytest.raises(TypeError, match="inputs is None"):
        pruned(Wanda(), random_weight(), NM(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.999])
def test_magnitude_takes_the_smallest_of_the_whole_matrix(dtype, ratio):
    weight = random_weight(dtype)
    order = weight.float().abs().flatten().argsort(stable=True)
    expected = weight.flatten().clone()
    expected[order[: int(weight.numel() * ratio)]] = 0
    got, bad = pruned(Magnitude(), weight, Unstructured(ratio))
    assert torch.equal(got, expected.view_as(weight))
    assert bad == -1


def test_magnitude_ties_go_lowest_index_first():
    weight = torch.tensor([[3.0, -1.0, 1.0, 1.0], [1.0, -1.0, 2.0, -0.0]])
    got, _ = pruned(Magnitude(), weight, Unstructured(0.5))  # -0, then three of five ones
    assert got.tolist() == [[3, 0, 0, 0], [1, -1, 2, 0]]
    kept, _ = pruned(Magnitude(), weight, Unstructured(0.0))
    assert not torch.signbit(kept[1, 3])  # a kept -0.0 becomes +0.0


def test_magnitude_treats_strided_weights():
    wide = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    part, before = wide[:, :16], wide.clone()
    Magnitude().prune_(part, Unstructured(0.5), None, torch.zeros(1, dtype=torch.int32))
    assert int((part == 0).sum()) == 64
    assert torch.equal(wide[:, 16:], before[:, 16:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_magnitude_leaves_a_matrix_that_is_not_finite(value):
    weight = random_weight()
    weight[5, 3] = weight[9, 0] = value
    got, bad = pruned(Magnitude(), weight, Unstructured(0.5))
    assert bad == 5
    assert torch.equal(got.nan_to_num(), weight.nan_to_num())


def test_magnitude_scopes():
    weight = random_weight()
    expected = weight.clone()
    reference.prune_rows_(expected, None, 32)
    rows, _ = pruned(Magnitude("row"), weight, Unstructured(0.5))
    assert torch.equal(rows, expected)
    assert not torch.equal(rows, pruned(Magnitude(), weight, Unstructured(0.5))[0])
    groups = [pruned(Magnitude(scope), weight, NM(2, 4))[0] for scope in ("row", "matrix")]
    assert torch.equal(*groups)
    with pytest.raises(ValueError, match="'matrix' or 'row', not 'layer'"):
        Magnitude("layer")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6])
def test_variant_searches_alpha_as_the_original(dtype, ratio):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 80, generator=generator).pow(3).to(dtype)
    norm = torch.randn(80, generator=generator).exp()
    expected = weight.clone()
    original.prune_variant_(expected, norm.square(), ratio)
    got, bad = pruned(Wanda(variant=True), weight, Unstructured(ratio), norm)
    assert bad == -1
    assert torch.equal(got, expected)
    zeros = (got == 0).sum(1)
    assert zeros.min() < zeros.max()  # rows differ
    assert int(zeros.sum()) / got.numel() == pytest.approx(ratio, abs=0.001)


def test_variant_keeps_rows_whose_lowest_score_is_too_much():
    weight = torch.rand(64, 50, generator=torch.Generator().manual_seed(4)) + 0.001
    weight[7], weight[7, 3] = 0.0, 5.0  # all there is lies in one weight
    weight[9] = 0.0
    got, _ = pruned(Wanda(variant=True), weight, Unstructured(0.5), torch.ones(50))
    assert got[7].tolist() == weight[7].tolist()
    few = torch.rand(1000, 2, generator=torch.Generator().manual_seed(5)) + 0.5
    few[0] = 1.0
    got, _ = pruned(Wanda(variant=True), few, Unstructured(0.3), torch.ones(2))
    assert got[0].tolist() == [1.0, 1.0]  # of equal ones none goes alone


def test_variant_refuses_what_it_cannot_do():
    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj becomes 2:4, and W"
    ):
        prune_model(model, token_ids(), "2:4", method="wanda-variant", swap=False, progress=False)
    assert changed(model, before) == []
    for ratio in (0.0, 0.99):
        with pytest.raises(ValueError, match="comes no nearer than"):
            pruned(Wanda(variant=True), random_weight(), Unstructured(ratio), random_norm())
    weight = random_weight()
    weight[5, 3] = float("nan")
    got, bad = pruned(Wanda(variant=True), weight, Unstructured(0.5), random_norm())
    assert bad == 5
    assert torch.equal(got.nan_to_num(), weight.nan_to_num())


def test_sparsity_of_a_kind_no_method_knows():
    class Odd(Sparsity):
        keep_fraction = 0.5

        def __str__(self) -> str:
            return "odd"

    with pytest.raises(TypeError, match="no rule for a sparsity of type Odd"):
        pruned(Wanda(), random_weight(), Odd(), random_norm())


def test_get_method():
    assert get_method("wanda") == Wanda()
    assert get_method("wanda-variant") == Wanda(variant=True)
    assert get_method("magnitude") == Magnitude("matrix")
    assert get_method(Magnitude("row")) == Magnitude("row")
    assert all(get_method(name).name == name for name in METHODS)
    with pytest.raises(
        ValueError, match="no method 'obd': pass one of wanda, wanda-variant, magnitude, sparsegpt"
    ):
        get_method("obd")
    for wrong in (Wanda, 3, None):
        with pytest.raises(TypeError, match="a method object"):
            get_method(wrong)
