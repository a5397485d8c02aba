"""prune_model: the original's masks, every refusal, and blocks that are pruned whole or not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import (
    CONTEXT,
    FAMILIES,
    VOCAB,
    assert_same_masks,
    changed,
    padded_batches,
    tiny_model,
    tiny_tokenizer,
    token_ids,
    weights_of,
)
from torch import nn

import original
from wanda_ext.prune.prune import PruneError, prune_model
from wanda_ext.report.report import PruneReport

QUIET = {"swap": False, "progress": False}
UP = "model.layers.1.mlp.up_proj"
LINEARS = {"opt": 6, "bloom": 4, "gpt_neox": 4, "gpt2": 4}  # of a block; 7 in the others


# --- Masks and statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["50%", 0.6, "4:8", "2:4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_original(family, sparsity):
    model = tiny_model(family)
    twin = copy.deepcopy(model)
    ids = token_ids()
    report = prune_model(model, ids, sparsity, batch_size=3, **QUIET)
    wanted = {"50%": 0.5, "4:8": (4, 8), "2:4": (2, 4)}.get(sparsity, sparsity)
    original.prune(twin, [{"input_ids": row[None]} for row in ids], wanted)
    assert_same_masks(model, twin)
    assert all(linear.tokens == ids.numel() for linear in report.linears)
    assert (
        len(report.pruned)
        == len(report.linears)
        == 3 * (7 if "layers.0.mlp.up_proj" in str(report) else 6 if family == "opt" else 4)
    )


@pytest.mark.parametrize("sparsity", ["60%", "2:4"])
def test_masks_with_left_padded_batches(sparsity):
    model = tiny_model()
    twin, careless = copy.deepcopy(model), copy.deepcopy(model)
    batches = padded_batches()
    prune_model(model, batches, sparsity, **QUIET)
    rows = [
        {key: tensor[i : i + 1] for key, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    original.prune(twin, rows, 0.6 if sparsity == "60%" else (2, 4))
    assert_same_masks(model, twin)
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    prune_model(careless, unmasked, sparsity, **QUIET)
    with pytest.raises(AssertionError):  # so the mask mattered
        assert_same_masks(model, careless)


def test_batch_size_does_not_matter_for_the_masks():
    model = tiny_model("qwen3")
    twin = copy.deepcopy(model)
    prune_model(model, token_ids(), 0.5, batch_size=1, **QUIET)
    prune_model(twin, token_ids(), 0.5, batch_size=8, **QUIET)
    assert_same_masks(model, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model(dtype=dtype)
    report = prune_model(model, token_ids(), "2:4", **QUIET)
    weight = model.get_submodule(UP).weight
    assert weight.dtype == dtype
    assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    assert report.linears[0].dtype == str(dtype).removeprefix("torch.")


def test_text_with_a_tokenizer_of_the_model(tmp_path):
    model = tiny_model()
    tiny_tokenizer().save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    report = prune_model(model, "builtin", 0.5, nsamples=4, **QUIET)
    assert report.pruned[0].tokens == 4 * CONTEXT
    assert report.arguments["calib"] == "builtin"


def test_magnitude_needs_no_data_and_runs_no_forward(monkeypatch):
    model = tiny_model("gpt2")
    before = weights_of(model)
    monkeypatch.setattr(type(model), "forward", None)
    report = prune_model(model, None, 0.5, method="magnitude", **QUIET)
    name = "transformer.h.1.mlp.c_fc.weight"
    weight, old = model.state_dict()[name], before[name]
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert old[weight == 0].abs().max() <= old[weight != 0].abs().min()
    assert report.pruned[0].tokens == 0
    assert report.pruned[0].score_kept == pytest.approx(
        float(model.transformer.h[0].attn.c_attn.weight.detach().abs().sum()), rel=1e-5
    )
    assert report.arguments["method"] == "Magnitude(scope='matrix')"


def test_its_error_goes_through_pickle_with_its_report(monkeypatch):
    monkeypatch.setattr("wanda_ext.prune.prune.swap_pruned", lambda *_: 1 / 0)
    with pytest.raises(PruneError, match="swap: division by zero") as caught:
        prune_model(tiny_model(), token_ids(), 0.5, **QUIET)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.report == caught.value.report and len(again.report.pruned) == 21


# --- What is pruned ------------------------------------------------------------------------------


def test_report_tells_what_was_done(tmp_path):
    model = tiny_model()
    before = weights_of(model)
    report = prune_model(model, token_ids(), "2:4", progress=False)
    assert report.swap == "swapped nothing: packed linears save memory on the CPU, not time"
    assert str(report).startswith(report.swap)
    assert report.status == "complete"
    assert report.sparsity == 0.5
    assert report.block_weights == sum(p.numel() for p in model.model.layers.parameters())
    assert report.peak_memory["cpu"] > 2**20
    assert report.seconds > 0
    assert report.versions["torch"] == torch.__version__
    assert report.versions.keys() == {"wanda_ext", "torch", "transformers", "python"}
    line = report.linears[0]
    assert (line.name, line.shape) == ("model.layers.0.self_attn.q_proj", (64, 64))
    assert line.path == "cpu"
    old = before[f"{line.name}.weight"]
    embedded = model.model.embed_tokens(token_ids())
    norm = model.model.layers[0].input_layernorm(embedded).reshape(-1, 64).norm(dim=0)
    score = old.abs() * norm
    kept = model.get_submodule(line.name).weight != 0
    assert line.score_kept == pytest.approx(score[kept].sum().item(), rel=1e-4)
    assert line.score_lost == pytest.approx(score[~kept].sum().item(), rel=1e-4)
    report.save(tmp_path / "r.json")
    assert PruneReport.load(tmp_path / "r.json") == report


def test_ops_without_a_kernel_run_on_a_copy(monkeypatch):
    asked = []
    monkeypatch.setattr("wanda_ext.ops.supports", lambda op, device: asked.append(op) or False)
    model, plain = tiny_model(), tiny_model()
    prune_model(model, token_ids(), 0.5, **QUIET)
    assert set(asked) == {"input_sumsq_", "prune_rows_", "prune_nm_"}
    monkeypatch.undo()
    prune_model(plain, token_ids(), 0.5, **QUIET)
    assert_same_masks(model, plain)


def test_works_inside_inference_mode():
    model, twin = tiny_model(), tiny_model()
    with torch.inference_mode():
        prune_model(model, token_ids(), "2:4", **QUIET)
    prune_model(twin, token_ids(), "2:4", **QUIET)
    assert_same_masks(model, twin)


def test_progress_bar_counts_blocks(capsys):
    prune_model(tiny_model(), token_ids(), 0.5, swap=False)
    assert "3/3" in capsys.readouterr().err
    prune_model(tiny_model(), token_ids(), 0.5, **QUIET)
    assert capsys.readouterr().err == ""


# --- Swap ----------------------------------------------------------------------------------------


def test_swap_puts_packed_linears_in():
    model = tiny_model()
    twin = copy.deepcopy(model)
    report = prune_model(model, token_ids(), "2:4", swap=True, progress=False)
    prune_model(twin, token_ids(), "2:4", **QUIET)
    assert report.swap == "swapped 21 of 21 linears for packed ones"
    assert not isinstance(model.get_submodule(UP), nn.Linear)
    ids = token_ids(2)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"q_proj is packed already: call unswap_linears"):
        prune_model(model, token_ids(), "2:4", **QUIET)
    report = prune_model(twin, token_ids(), 0.5, progress=False)
    assert report.swap == "swapped nothing: packed linears save memory on the CPU, not time"


# --- Refusals before any work --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sparsity": 1.0}, ValueError, "up to but not including 1"),
        ({"sparsity": "3:7"}, ValueError, r"layers\.0\.self_attn\.q_proj has 64 input features"),
        ({"sparsity": {"*.fc1": 0.5}}, ValueError, r"sparsity glob '\*\.fc1' matches no module"),
        ({"sparsity": {"*.mlp.*": None}}, ValueError, "nothing to prune"),
        ({"ignore": ["*.fc1"]}, ValueError, r"ignore glob '\*\.fc1' matches no module"),
        ({"ignore": "*"}, ValueError, "nothing to prune"),
        ({"method": "obd"}, ValueError, "no method 'obd'"),
        ({"calib": 7}, TypeError, "calib must be"),
        ({"calib": None}, TypeError, "calib must be"),
        ({"calib": ["few words"], "tokenizer": tiny_tokenizer()}, ValueError, "too little calib"),
        ({"calib": ["some text"]}, ValueError, "text needs a tokenizer.*pass tokenizer="),
        ({"calib": token_ids(2, CONTEXT + 1)}, ValueError, f"over the limit of {CONTEXT}"),
        ({"calib": token_ids() + VOCAB}, ValueError, f"vocabulary has {VOCAB}"),
        ({"calib": "builtin", "seqlen": 99}, ValueError, "seqlen=99 is over the model's context"),
        ({"blocks": "model.blocks"}, ValueError, "is no ModuleList of this model"),
        ({"swap": 1}, ValueError, "swap must be 'auto', True or False, not 1"),
        ({"swap": True, "sparsity": 0.2}, ValueError, r"at least 30% .*q_proj becomes 20%"),
        ({"ignore": 3}, TypeError, r"ignore must be a glob or several, .*, not 3"),
        ({"ignore": ["*.q_proj", None]}, TypeError, "ignore must be a glob or several"),
        ({"tokens": ()}, ValueError, r"tokens must be row counts.*not \(\)"),
        ({"tokens": (0,)}, ValueError, "tokens must be row counts"),
        ({"tokens": 8}, ValueError, "tokens must be row counts"),
        ({"tokens": "8"}, ValueError, "tokens must be row counts"),
        ({"device": "meta"}, ValueError, "device='meta' holds no values to prune"),
        ({"device": "cuda:99"}, ValueError, r"device='cuda:99' cannot be used here \(.*leave devi"),
        ({"device": "gpu"}, ValueError, "device='gpu' cannot be used here"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, error, match):
    model = tiny_model()
    before = weights_of(model)
    call = {"calib": token_ids(), "sparsity": "2:4", **QUIET, **arguments}
    with pytest.raises(error, match=match):
        prune_model(model, **call)
    assert changed(model, before) == []


def test_device_of_a_spread_model():
    model = tiny_model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="spread over 0, 1: leave device out"):
        prune_model(model, token_ids(), 0.5, device="cpu", **QUIET)
