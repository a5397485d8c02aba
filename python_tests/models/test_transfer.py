"""Copies beside the work: the order they keep, what a failure leaves, and a whole prune by them."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import Tensor, nn

from wanda_ext import PruneError, prune_model
from wanda_ext.models.transfer import Copies, Visits

CPU = torch.device("cpu")
QUIET = {"progress": False, "swap": False}
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
places = pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=gpu)])


@places
def test_what_was_sent_is_what_is_brought_next(place: str) -> None:
    home = torch.zeros(1000)
    with Copies(torch.device(place)) as copies:
        for i in range(50):
            here = copies.bring(home)()
            assert here.device.type == place
            assert here.data_ptr() != home.data_ptr()
            copies.send((here + 1, home))
            assert torch.equal(copies.bring(home)().cpu(), torch.full((1000,), i + 1.0))
    assert torch.equal(home, torch.full((1000,), 50.0))


def test_copies_run_beside_their_caller() -> None:
    """The caller comes back while the thread of the copies is still held up."""
    gate = threading.Event()
    with Copies(CPU) as copies:
        copies._worker.submit(gate.wait)
        arrive = copies.bring(torch.ones(3))
        gate.set()
        assert torch.equal(arrive(), torch.ones(3))


def test_a_failed_copy_is_raised_by_finish() -> None:
    with Copies(CPU) as copies:
        copies.send((torch.ones(3), torch.ones(4)))
        copies.send((torch.ones(3), torch.zeros(3)))
        with pytest.raises(RuntimeError, match="size"):
            copies.finish()
        copies.finish()


def blocks_of_two() -> list[nn.Module]:
    return [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)]


@places
def test_a_visit_changes_the_block_at_home(place: str) -> None:
    blocks = blocks_of_two()
    homes = [block.weight.data_ptr() for block in blocks]
    with Copies(torch.device(place)) as copies:
        visits = Visits(blocks, copies)
        for i, block in enumerate(blocks):
            with visits.visit(i), torch.no_grad():
                assert block.weight.device.type == place
                assert block.weight.data_ptr() not in homes
                block.weight.fill_(i)
    for i, block in enumerate(blocks):
        assert block.weight.data_ptr() == homes[i]
        assert torch.equal(block.weight, torch.full((2, 2), float(i)))


@places
def test_a_visit_that_fails_leaves_no_trace(place: str) -> None:
    blocks = blocks_of_two()
    before = [block.weight.clone() for block in blocks]
    with Copies(torch.device(place)) as copies:
        visits = Visits(blocks, copies)
        with pytest.raises(KeyboardInterrupt), visits.visit(0), torch.no_grad():
            blocks[0].weight.zero_()
            raise KeyboardInterrupt
    for block, weight in zip(blocks, before, strict=True):
        assert torch.equal(block.weight, weight)


def test_a_weight_of_two_neighbours_arrives_as_the_first_one_left_it() -> None:
    blocks = blocks_of_two()
    blocks[1].weight = blocks[0].weight
    with Copies(CPU) as copies:
        visits = Visits(blocks, copies)
        with visits.visit(0), torch.no_grad():
            blocks[0].weight.fill_(7)
        with visits.visit(1):
            assert torch.equal(blocks[1].weight, torch.full((2, 2), 7.0))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """device="cpu" counts as another place than the model's, so that all goes by copies."""
    monkeypatch.setattr("wanda_ext.prune.prune.usable_device", lambda device: torch.device("cpu:0"))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prune_by_copies_has_the_same_bits(family: str) -> None:
    results = []
    for device in (None, "cpu"):
        model = tiny_model(family)
        report = prune_model(model, token_ids(), "2:4", device=device, batch_size=2, **QUIET)
        results.append((weights_of(model), [line.score_kept for line in report.linears]))
    (here, scores), (there, other_scores) = results
    assert scores == other_scores
    for name, weight in here.items():
        assert torch.equal(weight, there[name]), name


@pytest.mark.usefixtures("elsewhere")
def test_a_prune_by_copies_that_fails_keeps_finished_blocks_only() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    before = weights_of(model)
    with pytest.raises(PruneError) as raised:
        prune_model(model, token_ids(), "2:4", device="cpu", **QUIET)
    assert {line.name.split(".")[2] for line in raised.value.report.pruned} == {"0"}
    for name, weight in weights_of(model).items():
        pruned = ".layers.0." in name and "norm" not in name
        assert torch.equal(weight, before[name]) != pruned, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_pruned_through_the_gpu_stays_on_the_cpu() -> None:
    model = tiny_model("llama")
    report = prune_model(model, token_ids(), "2:4", device="cuda", **QUIET)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(line.path == "cuda" for line in report.pruned)
    assert all(abs(line.reached - 0.5) < 1e-6 for line in report.pruned)
