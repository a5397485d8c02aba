"""Which weights each method takes."""

from __future__ import annotations

import pytest
import torch

from wanda_ext import reference
from wanda_ext.methods import METHODS, Magnitude, Wanda, get_method
from wanda_ext.sparsity import NM, Sparsity, Unstructured

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def random_norm() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(1)).exp()


def pruned(method, weight, sparsity, norm=None):
    weight, bad = weight.clone(), torch.tensor([7], dtype=torch.int32)
    method.prune_(weight, sparsity, norm, bad)
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
    with pytest.raises(TypeError, match="input_norm is None"):
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


def test_sparsity_of_a_kind_no_method_knows():
    class Odd(Sparsity):
        keep_fraction = 0.5

        def __str__(self) -> str:
            return "odd"

    with pytest.raises(TypeError, match="no rule for a sparsity of type Odd"):
        pruned(Wanda(), random_weight(), Odd(), random_norm())


def test_get_method():
    assert get_method("wanda") == Wanda()
    assert get_method("magnitude") == Magnitude("matrix")
    assert get_method(Magnitude("row")) == Magnitude("row")
    assert all(get_method(name).name == name for name in METHODS)
    with pytest.raises(ValueError, match="no method 'obd': pass one of wanda, magnitude"):
        get_method("obd")
    for wrong in (Wanda, 3, None):
        with pytest.raises(TypeError, match="a method object"):
            get_method(wrong)
