"""Every decoder family of transformers through the one runner, beside full forward passes.

For each row of families.py, with each attention and with and without padding: the statistics are
those of a full forward, the masks those of a plain sort, and what the runner passes from block to
block is what the pruned model computes itself.
"""

from __future__ import annotations

from contextlib import closing

import families
import pytest
import torch
import transformers
from tiny_models import changed, token_ids, weights_of
from torch.overrides import TorchFunctionMode

from wanda_ext.methods import Wanda
from wanda_ext.models.blocks import find_blocks, linears_of, preserved, weight_of
from wanda_ext.models.experts import FEW_TOKENS, ExpertSlice, expert_slices
from wanda_ext.prune.commit import pruned_block
from wanda_ext.prune.plan import plan_blocks
from wanda_ext.prune.prune import prune_model
from wanda_ext.runner.lockstep import start_walk

IN_LOCK_STEP = ("rwkv",)  # it halves the hidden states between blocks
UNPADDED_ONLY = {"recurrent_gemma": "its mask wants positions that its own forward makes"}


def batches_of(padded: bool) -> list[dict[str, torch.Tensor]]:
    ids = token_ids(4, 24)
    if not padded:
        return [{"input_ids": rows} for rows in ids.split(2)]
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 9, 3, 15)):
        ids[row, :padding], mask[row, :padding] = 2, 0
    return [
        {"input_ids": rows, "attention_mask": kept}
        for rows, kept in zip(ids.split(2), mask.split(2), strict=True)
    ]


class Products(TorchFunctionMode):
    """Sees the rows that are multiplied by slices of 3-D weights, whatever code does it."""

    def __init__(self, slices: dict[str, ExpertSlice], kept: torch.Tensor) -> None:
        super().__init__()
        self.at = {s.weight.data_ptr(): (name, s) for name, s in slices.items()}
        self.kept = kept  # the rows of the tokens that count
        self.rows: dict[str, torch.Tensor] = {}
        self.counted: dict[int, torch.Tensor] = {}  # by expert

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if func.__name__ in ("linear", "matmul", "__matmul__", "bmm") and len(tensors) >= 2:
            x, weight = tensors[0].detach(), tensors[1].detach()
            if weight.dim() == 3:
                for part, own in zip(x, weight, strict=True):
                    self.see(part, own.data_ptr())
            else:
                self.see(x, weight.data_ptr())
        return func(*args, **(kwargs or {}))

    def see(self, x: torch.Tensor, address: int) -> None:
        name, part = self.at.get(address, ("", None))
        if part is None:
            return
        if part.parameter != "down_proj":  # rows that are no kept token's, or not routed here
            known = (x[:, None] == self.kept).all(dim=2).any(dim=1)
            self.counted[part.index] = known & x.any(dim=1)
        self.rows[name] = x[self.counted[part.index]]


@torch.no_grad()
def brute_force(model, block, batches):
    """Sums of squares and rows of what enters the block's linears and experts, by full forwards."""
    found: dict[str, list] = {}
    slices = expert_slices(block)
    owners = {s.owner for s in slices.values()}
    inside, keep = [], None

    def add(name, x):
        entry = found.setdefault(name, [0, 0])
        entry[0] = entry[0] + x.double().square().sum(0)
        entry[1] += len(x)

    def see(name):
        def hook(module, args):
            if inside:
                x = args[0].reshape(-1, args[0].shape[-1])
                add(name, x if keep is None else x[keep])

        return hook

    def enter(module, args):
        x = args[0].reshape(-1, args[0].shape[-1])
        parts = x if len(args) > 1 else x.view(len(slices) // 2, -1, x.shape[1]).flatten(0, 1)
        times = 1 if keep is None else len(parts) // len(keep)
        rows = parts if keep is None else parts[keep.repeat(times)]
        module.mode = Products({n: s for n, s in slices.items() if s.owner is module}, rows)
        module.mode.__enter__()

    def leave(module, args, out):
        module.mode.__exit__(None, None, None)
        for name, rows in module.mode.rows.items():
            add(name, rows)

    hooks = [
        block.register_forward_pre_hook(lambda *_: inside.append(1)),
        block.register_forward_hook(lambda *_: inside.clear()),
        *(m.register_forward_pre_hook(see(n)) for n, m in linears_of(block).items()),
        *(owner.register_forward_pre_hook(enter) for owner in owners),
        *(owner.register_forward_hook(leave) for owner in owners),
    ]
    implementations = {id(owner): getattr(owner, "config", None) for owner in owners}
    before = [getattr(c, "_experts_implementation", None) for c in implementations.values()]
    for config in implementations.values():
        if config is not None:
            config._experts_implementation = "eager"
    for batch in batches:
        keep = batch["attention_mask"].bool().flatten() if "attention_mask" in batch else None
        model(**batch, use_cache=False)
    for config, old in zip(implementations.values(), before, strict=True):
        if config is not None:
            config._experts_implementation = old
    for handle in hooks:
        handle.remove()
    return found


def assert_masks(name, before, after, sumsq):
    """Half of each row went: those of the lowest scores, but for ties within rounding."""
    score = before.abs().double() * sumsq.sqrt()
    n_prune = before.shape[1] // 2
    ranked = score.sort(dim=1).values
    last, first = ranked[:, n_prune - 1 : n_prune], ranked[:, n_prune : n_prune + 1]
    gone = after == 0
    assert torch.equal(gone.sum(1), torch.full((len(gone),), n_prune)), name
    assert gone[score < first * (1 - 1e-5)].all(), name
    assert not gone[score > last * (1 + 1e-5)].any(), name
    assert torch.equal(after[~gone], before[~gone]), name


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", families.available())
def test_family(row, attention, padded):
    if padded and row in UNPADDED_ONLY:
        pytest.skip(UNPADDED_ONLY[row])
    model = families.build(row, attention)
    if model is None:
        pytest.skip("has no such attention")
    batches = batches_of(padded)
    plan = plan_blocks(model, 0.5)
    blocks = [(block.name, block.module) for block in plan]
    with preserved(model), closing(start_walk(model, blocks, batches)) as walk:
        assert ("in lock-step" in walk.runner) == (row in IN_LOCK_STEP)
        for i, block in enumerate(plan):
            targets = {name: linear.module for name, linear in block.targets.items()}
            found = walk.statistics(i, targets)
            expected = brute_force(model, block.module, batches)
            layers: dict[tuple, list] = {}
            for name, (sumsq, tokens) in expected.items():
                if isinstance(targets.get(name), ExpertSlice):
                    layers.setdefault(layer_of(name), []).append((sumsq, tokens))
            for name, statistic in found.items():
                sumsq, tokens = expected.get(name, (None, 0))
                assert statistic.tokens == tokens, name
                few = isinstance(targets[name], ExpertSlice) and tokens < FEW_TOKENS
                assert statistic.of_layer == few
                if few:
                    sums, counts = zip(*layers[layer_of(name)], strict=True)
                    sumsq = sum(sums) * max(tokens, 1) / sum(counts)
                torch.testing.assert_close(statistic.sumsq, sumsq, rtol=1e-5, atol=1e-12)
                expected[name] = sumsq, tokens
            assert expected.keys() & targets.keys() == found.keys()
            before = {name: dense(target) for name, target in targets.items()}
            with pruned_block(block, Wanda(), [found]):
                for name, target in targets.items():
                    if name in found:
                        assert_masks(name, before[name], dense(target), expected[name][0])
                    else:
                        assert torch.equal(before[name], dense(target)), name
                walk.advance(i)
        last = []
        blocks[-1][1].register_forward_hook(lambda module, args, out: last.append(out))
        for hidden, batch in zip(walk.hidden, batches, strict=True):
            model(**batch, use_cache=False)
            out = last[-1][0] if isinstance(last[-1], (tuple, list)) else last[-1]
            torch.testing.assert_close(hidden, out, rtol=1e-4, atol=1e-5)


def layer_of(name):
    """The name without its expert's number."""
    path, _, weight = name.rpartition(".")
    return path.rpartition(".")[0], weight


def dense(target):
    """A copy of the weight as [n, k]."""
    turned = getattr(target, "transposed", False) or type(target).__name__ == "Conv1D"
    weight = weight_of(target).clone()
    return weight.T if turned else weight


# Weights with three dimensions that are no experts, and experts whose layout is not known.
OTHER_3D = {"recurrent_gemma", "rwkv", "jetmoe"}


def test_no_fused_experts_are_overlooked():
    overlooked = set()
    for row in families.available():
        model = families.build(row, "eager")
        known = {(id(s.owner), s.parameter) for s in expert_slices(model).values()}
        for name, parameter in model.named_parameters():
            owner, _, own = name.rpartition(".")
            seen = (id(model.get_submodule(owner)), own) in known
            if parameter.dim() == 3 and "conv" not in name and not seen:
                overlooked.add(row)
    in_5_0 = {"granitemoe", "aria"} if transformers.__version__.startswith("5.0.") else set()
    assert overlooked == OTHER_3D | in_5_0


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl"])
def test_multimodal_wrappers_prune_their_text_decoder(kind):
    model = families.build_multimodal(kind)
    before = weights_of(model)
    report = prune_model(model, token_ids(4, 24), 0.5, swap=False, progress=False)
    assert report.runner == "each block ran by itself"
    assert len(report.pruned) == 3 * 7
    assert {name.rpartition(".layers.")[0] for name in changed(model, before)} == {
        "model.language_model"
    }
    assert set(changed(model, before)) == {f"{line.name}.weight" for line in report.pruned}
    text = find_blocks(model)
    assert len(text) == 3 and text[0][0] == "model.language_model.layers.0"


def test_there_are_enough_of_them():
    kinds = {kind for kind, _ in families.ROWS.values()}
    assert len(families.ROWS) >= 40
    assert len(kinds) >= 40
