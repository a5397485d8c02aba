"""SparseGPT: the original's masks and weights, what makes them right, and what is refused."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from one_linear import correlated, loss, pruned, statistic_of, weight_of_shape
from streamed import assert_same_tensors, in_memory, prune, saved
from tiny_models import changed, padded_batches, tiny_model, token_ids, weights_of

import original
import original_sparsegpt
from wanda_ext import methods
from wanda_ext.methods import SparseGPT, Wanda
from wanda_ext.methods.sparsegpt import inverse_factor
from wanda_ext.methods.sparsity import NM, Unstructured
from wanda_ext.methods.statistic import InputStatistic, gram_of
from wanda_ext.prune.prune import PruneError, prune_model
from wanda_ext.prune.verify import verify

QUIET = {"swap": False, "progress": False}
SPARSITIES = {0.5: Unstructured(0.5), 0.6: Unstructured(0.6), (2, 4): NM(2, 4), (4, 8): NM(4, 8)}


# --- Beside the original --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"blocksize": 32, "percdamp": 0.1}])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_linear_becomes_what_the_original_makes_of_it(sparsity, options):
    x, weight = correlated(), weight_of_shape()
    hessian = original_sparsegpt.Hessian(192)
    for part in x.split(150):
        hessian.add_batch(part[None])
    expected = weight.clone()
    original_sparsegpt.prune_sparsegpt_(expected, hessian.matrix, sparsity, **options)
    got, bad = pruned(SparseGPT(**options), weight, SPARSITIES[sparsity], statistic_of(x))
    assert bad == -1
    assert torch.equal(got != 0, expected != 0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    by_norm, _ = pruned(Wanda(), weight, SPARSITIES[sparsity], statistic_of(x))
    assert loss(weight, got, x) < loss(weight, by_norm, x)


@pytest.mark.parametrize("sparsity", ["50%", "60%", "2:4", "4:8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_become_what_the_original_makes_of_them(family, sparsity):
    model = tiny_model(family)
    twin, batches = copy.deepcopy(model), padded_batches()
    wanted = float(sparsity[:-1]) / 100 if "%" in sparsity else tuple(map(int, sparsity.split(":")))
    report = prune_model(model, batches, sparsity, method="sparsegpt", **QUIET)
    rows = [
        {key: tensor[i : i + 1] for key, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    original.prune(twin, rows, wanted, "sparsegpt")
    expected = twin.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor != 0, expected[name] != 0), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert report.sparsity == pytest.approx(0.6 if sparsity == "60%" else 0.5, abs=1e-3)
    verify(model, report).raise_if_bad()


# --- What makes it right --------------------------------------------------------------------------


def test_the_factor_is_of_the_inverse_hessian():
    gram = gram_of(correlated(k=48))
    factor = inverse_factor(gram, 0.01).double()
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(48)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    inverse = torch.linalg.inv(hessian)
    torch.testing.assert_close(factor.t() @ factor, inverse, rtol=1e-5, atol=1e-6 * inverse.max())


def test_what_follows_a_pruned_column_answers_it_best():
    x, weight = correlated(100, 6).double(), weight_of_shape(200, 6)
    x /= x.norm(dim=0)  # so that every column goes in some row
    inputs = statistic_of(x.float())
    got, _ = pruned(SparseGPT(percdamp=0.0), weight, NM(5, 6), inputs)
    for column in range(6):
        rows = got[:, column] == 0
        assert rows.any()
        rest = slice(column + 1, 6)  # those before it are done
        missing = weight[rows, column, None].double() * x[:, column]
        best = torch.linalg.lstsq(x[:, rest], missing.t()).solution.t()
        expected = weight[rows, rest].double() + best
        torch.testing.assert_close(got[rows, rest].double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got[rows, :column], weight[rows, :column])


def test_counts_are_exact_and_ties_go_lowest_column_first():
    unit = InputStatistic(torch.ones(8, dtype=torch.float64), 8, gram=torch.eye(8))
    method = SparseGPT(blocksize=4)
    rows, _ = pruned(method, torch.ones(3, 8), Unstructured(0.6), unit)  # int(12 * 0.6) of a block
    assert (rows == 0).int().tolist() == [[1, 1, 1, 0] * 2, [1, 1, 0, 0] * 2, [1, 1, 0, 0] * 2]
    groups, _ = pruned(method, torch.ones(3, 8), NM(1, 4), unit)
    assert groups.tolist() == [[0, 0, 0, 1] * 2] * 3
    kept, _ = pruned(method, torch.full((1, 8), -0.0), Unstructured(0.0), unit)
    assert not torch.signbit(kept).any()


def test_blocks_hold_whole_groups():
    x, weight = correlated(k=36), weight_of_shape(8, 36)
    for group, sizes in ((6, (8, 6, 11)), (12, (12, 5, 1))):
        results = [
            pruned(SparseGPT(blocksize=size), weight, NM(group // 2, group), statistic_of(x))[0]
            for size in sizes
        ]
        assert all(torch.equal(result, results[0]) for result in results)
        assert ((results[0] == 0).view(8, -1, group).sum(2) == group // 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_rounded_once_at_the_end(dtype):
    weight, inputs = weight_of_shape(dtype=dtype), statistic_of(correlated())
    got, bad = pruned(SparseGPT(), weight, NM(2, 4), inputs)
    full, _ = pruned(SparseGPT(), weight.float(), NM(2, 4), inputs)
    assert bad == -1
    assert torch.equal(got, full.to(dtype))


def test_features_that_are_always_zero_lose_their_weights():
    x, weight = correlated(), weight_of_shape()
    x[:, [3, 190]] = 0
    got, bad = pruned(SparseGPT(), weight, Unstructured(0.1), statistic_of(x))
    assert bad == -1
    assert not got[:, [3, 190]].any()
    live = [j for j in range(192) if j not in (3, 190)]
    assert got[:, live].count_nonzero() > 0.9 * 40 * 190  # they count among what goes


def test_linears_that_share_inputs_share_a_factor(monkeypatch):
    made = []

    def counted(gram, percdamp):
        made.append(len(gram))
        return inverse_factor(gram, percdamp)

    monkeypatch.setattr(methods.sparsegpt, "inverse_factor", counted)
    method = SparseGPT()
    prune_model(tiny_model(), token_ids(), 0.5, method=method, **QUIET)
    assert made == [64, 64, 64, 96] * 3  # q, k, v; o; gate, up; down
    assert len(method._factors) == 0  # none outlives its block


def test_fused_experts():
    model = families.build("qwen3_moe")
    before = weights_of(model)
    report = prune_model(model, token_ids(2), "2:4", method="sparsegpt", **QUIET)
    verify(model, report).raise_if_bad()
    notes = {line.note for line in report.pruned if "experts" in line.name}
    assert notes == {"", "few tokens: norms of all experts"}
    assert [name for name in changed(model, before) if "experts" in name]


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_stays(value):
    weight = weight_of_shape()
    weight[5, 3] = weight[9, 0] = value
    got, bad = pruned(SparseGPT(), weight, Unstructured(0.5), statistic_of(correlated()))
    assert bad == 5
    assert torch.equal(got.nan_to_num(), weight.nan_to_num())


def test_updates_beyond_the_dtype_are_told():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    weight = torch.full((2, 4), 1.0, dtype=torch.float16)
    weight[1] = 6e4  # the columns are one feature: two of them would have to hold four
    got, bad = pruned(SparseGPT(), weight, NM(2, 4), statistic_of(x))
    assert bad == 1
    assert torch.equal(got, weight)


def test_a_hessian_that_is_not_positive_definite_is_told_with_its_linear():
    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(
        PruneError,
        match=r"layers\.0\.self_attn\.q_proj: the Hessian .* percdamp=0.0 .* pass a larger",
    ):
        prune_model(model, token_ids(1), 0.5, method=SparseGPT(percdamp=0.0), **QUIET)
    assert changed(model, before) == []
    overflown = InputStatistic(
        torch.ones(2, dtype=torch.float64), 1, gram=torch.full((2, 2), torch.inf)
    )
    with pytest.raises(ValueError, match="not positive definite"):
        pruned(SparseGPT(), torch.ones(2, 2), Unstructured(0.5), overflown)


def test_options_and_inputs_are_checked():
    for options in ({"blocksize": 0}, {"percdamp": -0.1}, {"percdamp": float("nan")}):
        with pytest.raises(ValueError, match=r"The paper uses 128 and 0\.01"):
            SparseGPT(**options)
    assert repr(SparseGPT(64)) == "SparseGPT(blocksize=64, percdamp=0.01)"
    assert SparseGPT() == SparseGPT()
    weight = torch.ones(2, 4)
    for inputs in (None, InputStatistic(torch.ones(4, dtype=torch.float64), 1)):
        with pytest.raises(TypeError, match="gram matrix: none was collected"):
            pruned(SparseGPT(), weight, NM(2, 4), inputs)


def test_checkpoints_block_by_block_become_the_same(tmp_path):
    src = saved(tmp_path / "src", "gpt2")
    prune(src, tmp_path / "dst", sparsity=0.5, method="sparsegpt", states="files")
    in_memory(src, tmp_path / "other", sparsity=0.5, method="sparsegpt")
    assert_same_tensors(tmp_path / "dst", tmp_path / "other")
