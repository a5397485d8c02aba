"""repair: errors fall, zeros and everything else stay, and a block is repaired whole or not."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny_models import (
    FAMILIES,
    Block,
    Toy,
    batches_of_two,
    changed,
    padded_batches,
    tiny_model,
    token_ids,
    weights_of,
)

import wanda_ext
from wanda_ext.quality.repair import RepairError, repair

UP = "model.layers.1.mlp.up_proj.weight"
QUICK = {"epochs": 3, "batch_size": 2, "progress": False}


def pruned_pair(family="llama", sparsity="2:4", dtype=torch.float32, **options):
    dense = tiny_model(family, dtype)
    model = copy.deepcopy(dense)
    wanda_ext.prune_model(model, token_ids(), sparsity, swap=False, progress=False, **options)
    return model, dense


def distance(model, dense, ids):
    with torch.no_grad():
        wanted = dense(ids).logits.float()
        return float((model(ids).logits.float() - wanted).norm() / wanted.norm())


# --- What it does --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.6, "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_comes_nearer_to_the_dense_one(family, sparsity):
    model, dense = pruned_pair(family, sparsity)
    before, dense_before = weights_of(model), weights_of(dense)
    far = distance(model, dense, token_ids())
    report = repair(model, dense, token_ids(), **QUICK)
    assert len(report.blocks) == 3 and report.status == "complete"
    for block in report.blocks:
        assert 0 < block.error_after < 0.95 * block.error_before
    assert distance(model, dense, token_ids()) < 0.8 * far
    assert not changed(dense, dense_before)
    moved = changed(model, before)
    pruned = {name for name, old in before.items() if (dense_before[name][old == 0] != 0).any()}
    biases = {name.removesuffix("weight") + "bias" for name in pruned} & set(before)
    assert set(moved) <= pruned | biases and pruned <= set(moved)
    for name in pruned:
        assert torch.equal(model.state_dict()[name] == 0, before[name] == 0), name
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_it_helps_on_tokens_it_has_not_seen():
    model, dense = pruned_pair()
    unseen = token_ids(8, seed=7)
    far = distance(model, dense, unseen)
    repair(model, dense, token_ids(64, 32, seed=3), **QUICK)
    assert distance(model, dense, unseen) < 0.8 * far


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype):
    model, dense = pruned_pair(dtype=dtype)
    before = weights_of(model)
    report = repair(model, dense, token_ids(), **QUICK)
    assert all(block.error_after < 0.9 * block.error_before for block in report.blocks)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.state_dict()[UP] == 0, before[UP] == 0)
    assert changed(model, before)


def test_the_same_arguments_give_the_same_bits():
    model, dense = pruned_pair()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    repair(model, dense, token_ids(), **QUICK)
    torch.rand(3)
    repair(twin, dense, token_ids(), **QUICK)
    assert not changed(model, weights_of(twin))
    repair(other, dense, token_ids(), seed=1, **QUICK)
    assert UP in changed(other, weights_of(model))


def test_padding_counts_for_nothing():
    model, dense = pruned_pair()
    twin = copy.deepcopy(model)
    batches = padded_batches()
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)
    repair(model, dense, batches, **QUICK)
    repair(twin, dense, other, **QUICK)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_only_pruned_linears_are_trained():
    model, dense = pruned_pair(ignore=["*.q_proj", "model.layers.2"])
    before = weights_of(model)
    report = repair(model, dense, token_ids(), **QUICK)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert not [n for n in changed(model, before) if "q_proj" in n or "layers.2." in n]


def test_the_model_is_as_it_was_otherwise():
    model, dense = pruned_pair()
    model.train()
    dense.train()
    up = model.get_parameter(UP)
    up.requires_grad_(False)
    state = torch.get_rng_state()
    repair(model, dense, token_ids(), **QUICK)
    assert model.get_parameter(UP) is up and not up.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.training and dense.training and model.get_parameter(UP).grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_blocks_that_cannot_run_alone():
    torch.manual_seed(0)
    dense = Toy([Block(["b"]), Block(["c"])], between=lambda hidden: hidden * 1.5)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for block in model.blocks:
            for linear in block.linears.values():
                linear.weight[:, ::2] = 0
    report = repair(model, dense, batches_of_two(), blocks="blocks", **QUICK)
    assert all(block.error_after < block.error_before for block in report.blocks)
    assert not model.blocks[1].linears["a"].weight[:, ::2].any()


def test_a_block_that_gets_no_better_stays(monkeypatch):
    model, dense = pruned_pair()
    before = weights_of(model)
    monkeypatch.setattr("wanda_ext.quality.reconstruct._step_size", lambda done, steps: 50.0)
    report = repair(model, dense, token_ids(), **QUICK)
    assert not changed(model, before)
    assert all(block.error_after == block.error_before for block in report.blocks)


def test_a_device_gets_one_block_at_a_time(monkeypatch):
    model, dense = pruned_pair()
    twin = copy.deepcopy(model)
    repair(twin, dense, token_ids(), **QUICK)
    monkeypatch.setattr("wanda_ext.models.transfer.is_away", lambda blocks, device: True)
    repair(model, dense, token_ids(), device="cpu", **QUICK)
    assert not changed(model, weights_of(twin))


def test_report_tells_what_was_done(tmp_path, capsys):
    model, dense = pruned_pair()
    report = repair(model, dense, token_ids(), epochs=1)
    assert "3/3" in capsys.readouterr().err
    assert report.arguments["sequences"] == 8 and report.arguments["epochs"] == 1
    assert str(report).splitlines()[0].startswith("model.layers.0  error 0.")
    assert str(report).splitlines()[-1].startswith("complete: 3 blocks repaired in ")
    report.save(tmp_path / "r.json")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["blocks"][2]["error_after"] == report.blocks[2].error_after
    repair(model, dense, token_ids(), **QUICK)
    assert capsys.readouterr().err == ""


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_is_repaired_whole_or_not(monkeypatch, error):
    from wanda_ext.quality import reconstruct

    model, dense = pruned_pair()
    before = weights_of(model)
    real, trained = reconstruct._train, []

    def train(*args):
        real(*args)
        trained.append(1)
        if len(trained) == 2:
            raise error("enough")

    monkeypatch.setattr(reconstruct, "_train", train)
    with pytest.raises(RepairError if error is ValueError else error) as caught:
        repair(model, dense, token_ids(), **QUICK)
    report = caught.value.report
    assert report.status == "stopped at model.layers.1" and len(report.blocks) == 1
    assert {name[:15] for name in changed(model, before)} == {"model.layers.0."}
    if error is ValueError:
        assert "model.layers.1: enough (stopped; 1 blocks before are" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_is_not_finite_is_named():
    model, dense = pruned_pair()
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    before = weights_of(model)
    with pytest.raises(RepairError, match=r"^model\.layers\.1: what it puts out, or what it sho"):
        repair(model, dense, token_ids(), **QUICK)
    assert not [name for name in changed(model, before) if "layers.0." not in name]


def test_refusals():
    model, dense = pruned_pair()
    with pytest.raises(ValueError, match="nothing is pruned: no linear of model has a zero"):
        repair(dense, model, token_ids())
    with pytest.raises(ValueError, match=r"not of one architecture: model\.embed_tokens\.weight"):
        wrong = copy.deepcopy(dense)
        wrong.resize_token_embeddings(140)
        repair(model, wrong, token_ids())
    with pytest.raises(ValueError, match=r"is \[\d+, 64\] in model and absent in dense"):
        repair(model, tiny_model("gpt2"), token_ids())
    with pytest.raises(TypeError, match="dense: model must be a torch module, not str"):
        repair(model, "dense", token_ids())
    with pytest.raises(ValueError, match="epochs must be a positive whole number, not 0"):
        repair(model, dense, token_ids(), epochs=0)
    with pytest.raises(ValueError, match="learning_rate must be between 0 and 1, not 2"):
        repair(model, dense, token_ids(), learning_rate=2)
    wanda_ext.swap_linears(model)
    with pytest.raises(ValueError, match=r"model: .* is packed already: call unswap_linears"):
        repair(model, dense, token_ids())
