"""The corrected update: its target, its least squares, and what reduces to the plain method."""

from __future__ import annotations

import pytest
import torch
from one_linear import correlated, loss, pruned, statistic_of, weight_of_shape

from wanda_ext import methods
from wanda_ext.methods import (
    NM,
    Corrected,
    InputStatistic,
    Magnitude,
    SparseGPT,
    Unstructured,
    Updated,
    Wanda,
    drift_of,
    get_update,
    gram_of,
    with_update,
)
from wanda_ext.methods.corrected import corrected_target, damped, solve_kept_

METHODS = [Wanda(), Magnitude(), Magnitude(scope="row"), SparseGPT()]
SPARSITIES = [NM(2, 4), NM(16, 32), Unstructured(0.5)]


def two_inputs(tokens=400, k=64):
    """Inputs of the dense model and of the pruned one: [tokens, k] each."""
    dense = correlated(tokens, k)
    noise = torch.randn(k, k, generator=torch.Generator().manual_seed(3)) / k**0.5
    return dense, dense + 0.2 * dense @ noise


def stacked(x, share):
    """The rows of x in float64, and those that add `share` of the mean diagonal to their gram."""
    x = x.double()
    more = (share * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.cat([x, more])


# --- The oracle: torch.linalg.lstsq in float64 ----------------------------------------------------


@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_the_target_is_what_least_squares_gives(ridge):
    dense, x = two_inputs()
    weight = weight_of_shape(40, 64)
    rows, wanted = stacked(x, ridge), stacked(x, ridge) @ weight.double().t()
    wanted[: len(x)] = dense.double() @ weight.double().t()  # below them the ridge holds on to W
    expected = torch.linalg.lstsq(rows, wanted).solution.t()
    got = corrected_target(weight, gram_of(x), drift_of(dense, x), ridge)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
    assert (got - weight).abs().max() > 0.1


@pytest.mark.parametrize("steps", [200, 2000])  # many more than it takes do no harm
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_many_steps_reach_the_least_squares_of_every_row(sparsity, steps):
    x, target = correlated(400, 64), weight_of_shape(40, 64)
    start, _ = pruned(Wanda(), target, sparsity, statistic_of(x))
    got = start.clone()
    solve_kept_(got, target, gram_of(x), damping=0.01, steps=steps)
    rows = stacked(x, 0.01)
    for row, begun, wanted in zip(got, start, target, strict=True):
        kept = begun != 0
        expected = torch.linalg.lstsq(rows[:, kept], rows @ wanted.double()).solution
        torch.testing.assert_close(row[kept].double(), expected, rtol=1e-3, atol=1e-3)
        assert not row[~kept].any()


def test_every_step_comes_nearer():
    x, target = correlated(400, 64), weight_of_shape(40, 64)
    start, _ = pruned(SparseGPT(), target, NM(2, 4), statistic_of(x))
    losses = []
    for steps in (0, 1, 2, 5, 20):
        got = start.clone()
        solve_kept_(got, target, gram_of(x), damping=0.0, steps=steps)
        losses.append(loss(target, got, x))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


# --- What it does to a linear ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
def test_kept_weights_come_nearer_to_the_target(method, sparsity):
    dense, x = two_inputs()
    weight = weight_of_shape(40, 64)
    inputs = statistic_of(x, dense)
    target = corrected_target(weight, inputs.gram, inputs.drift, 0.1)
    chosen, _ = pruned(method, target, sparsity, inputs)
    got, bad = pruned(Updated(method, Corrected()), weight, sparsity, inputs)
    assert bad == -1
    assert torch.equal(got != 0, chosen != 0)
    assert loss(target, got, x) < loss(target, chosen, x)
    wanted = dense @ weight.t()
    errors = [float((x @ w.t() - wanted).square().sum()) for w in (target, weight)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_without_drift_and_steps_it_is_the_method(method, dtype):
    x, weight = correlated(400, 64), weight_of_shape(40, 64, dtype)
    plain, _ = pruned(method, weight, NM(2, 4), statistic_of(x))
    for inputs in (statistic_of(x), statistic_of(x, dense=x)):
        got, bad = pruned(Updated(method, Corrected(steps=0)), weight, NM(2, 4), inputs)
        assert bad == -1 and torch.equal(got, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_rounded_once_at_the_end(dtype):
    dense, x = two_inputs()
    weight, method = weight_of_shape(40, 64, dtype), Updated(SparseGPT(), Corrected())
    got, _ = pruned(method, weight, NM(2, 4), statistic_of(x, dense))
    full, _ = pruned(method, weight.float(), NM(2, 4), statistic_of(x, dense))
    assert torch.equal(got, full.to(dtype))


def test_the_same_bits_whatever_precision_the_caller_allows():
    dense, x = two_inputs()
    call = Updated(Wanda(), Corrected()), weight_of_shape(40, 64), NM(2, 4)
    first, _ = pruned(*call, statistic_of(x, dense))
    torch.set_float32_matmul_precision("medium")
    try:
        again, _ = pruned(*call, statistic_of(x, dense))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(first, again)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_features_that_are_always_zero(method):
    dense, x = two_inputs()
    x[:, [3, 60]] = 0
    weight = weight_of_shape(40, 64)
    got, bad = pruned(Updated(method, Corrected()), weight, NM(2, 4), statistic_of(x, dense))
    assert bad == -1 and got.isfinite().all()
    kept = got[:, [3, 60]]
    assert torch.equal(kept, weight[:, [3, 60]].where(kept != 0, 0.0))  # no token tells otherwise
    nothing = statistic_of(torch.zeros(5, 64), torch.zeros(5, 64))
    got, bad = pruned(Updated(method, Corrected()), weight, NM(2, 4), nothing)
    assert bad == -1 and torch.equal(got, pruned(method, weight, NM(2, 4), nothing)[0])


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_fewer_tokens_than_features(tokens):
    dense, x = two_inputs(tokens)
    method = Updated(SparseGPT(), Corrected())
    got, bad = pruned(method, weight_of_shape(40, 64), NM(2, 4), statistic_of(x, dense))
    assert bad == -1 and got.isfinite().all()
    assert ((got != 0).view(40, 16, 4).sum(2) == 2).all()


def test_a_kept_minus_zero_becomes_plus_zero():
    method = Updated(Wanda(), Corrected())
    got, _ = pruned(method, torch.full((2, 64), -0.0), NM(4, 4), statistic_of(correlated(50, 64)))
    assert not torch.signbit(got).any()


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_stays(value):
    dense, x = two_inputs()
    weight = weight_of_shape(40, 64)
    weight[5, 3] = value
    got, bad = pruned(Updated(Wanda(), Corrected()), weight, NM(2, 4), statistic_of(x, dense))
    assert bad == 5
    assert torch.equal(got.nan_to_num(), weight.nan_to_num())


def test_updates_beyond_the_dtype_are_told():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    weight = torch.full((2, 4), 1.0, dtype=torch.float16)
    weight[1] = 6e4  # the columns are one feature: two of them would have to hold four
    method = Updated(Wanda(), Corrected())
    got, bad = pruned(method, weight, NM(2, 4), statistic_of(x))
    assert bad == 1 and torch.equal(got, weight)


def test_what_cannot_be_solved_is_told():
    dense, x = two_inputs(3)
    weight, method = weight_of_shape(40, 64), Updated(Wanda(), Corrected(ridge=0))
    with pytest.raises(ValueError, match=r"ridge=0 .* not positive definite: pass a larger ridge"):
        pruned(method, weight, NM(2, 4), statistic_of(x, dense))
    dense[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinite activations enter it in the dense model"):
        pruned(Updated(Wanda(), Corrected()), weight, NM(2, 4), statistic_of(x, dense))
    for inputs in (None, InputStatistic(torch.ones(64, dtype=torch.float64), 1)):
        with pytest.raises(TypeError, match="gram matrix: none was collected"):
            pruned(method, weight, NM(2, 4), inputs)


def test_options_are_checked():
    wrong = ({"ridge": -1}, {"damping": float("nan")}, {"steps": -1}, {"steps": 1.5})
    for options in wrong:
        with pytest.raises(ValueError, match=r"Corrected needs ridge >= 0, .* got Corrected\("):
            Corrected(**options)
    assert get_update(None) is None
    assert get_update("corrected") == Corrected() == get_update(Corrected())
    with pytest.raises(ValueError, match="no update 'correct': pass one of corrected, or None"):
        get_update("correct")
    with pytest.raises(TypeError, match=r"a name \(corrected\) or Corrected\(...\), not True"):
        get_update(True)


def test_an_updated_method_is_a_method():
    method = with_update(Wanda(variant=True), Corrected())
    assert isinstance(method, methods.Method) and method.reads == "gram"
    assert method.name == "wanda-variant, corrected" and method.kernels == Wanda().kernels
    with pytest.raises(ValueError, match="pass a ratio such as"):
        method.check("linear", NM(2, 4))
    assert with_update(Wanda(), None) == Wanda()
    assert damped(torch.zeros(2, 2), 0.5).tolist() == [[1.0, 0.0], [0.0, 1.0]]
