"""hold_masks: zeros stay zeros under every kind of step, and everything else trains as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wanda_ext

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def pruned_net(dtype=torch.float32):
    """Two linears, half of whose weights are zero, around a dense one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        for i in (0, 3):
            net[i].weight.masked_fill_(torch.rand_like(net[i].weight) < 0.5, 0)
    return net.to(dtype)


def zeros_of(net):
    return {n: p.detach() == 0 for n, p in net.named_parameters() if p.dim() == 2}


def train(net, optimizer, steps=4):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(net[0].weight.dtype)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def assert_held(net, zeros):
    for name, parameter in net.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_fills_a_pruned_weight(name):
    net = pruned_net()
    free, before, zeros = copy.deepcopy(net), copy.deepcopy(net), zeros_of(net)
    optimizer = OPTIMIZERS[name](net.parameters())
    held = wanda_ext.hold_masks(optimizer)
    assert (held.parameters, held.zeros) == (2, sum(int(z.sum()) for z in zeros.values()))
    train(net, optimizer)
    assert_held(net, zeros)
    for trained, old in zip(net.parameters(), before.parameters(), strict=True):
        assert not torch.equal(trained, old)
    train(free, OPTIMIZERS[name](free.parameters()))
    with pytest.raises(AssertionError):  # so there was something to hold
        assert_held(free, zeros)


def test_its_first_step_is_the_free_one_masked():
    net = pruned_net()
    free, zeros = copy.deepcopy(net), zeros_of(net)
    for model, hold in ((net, True), (free, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if hold:
            wanda_ext.hold_masks(optimizer)
        train(model, optimizer, steps=1)
    for (name, held), other in zip(net.named_parameters(), free.parameters(), strict=True):
        wanted = other.masked_fill(zeros[name], 0) if name in zeros else other
        assert torch.equal(held, wanted)


def test_momentum_from_before_the_prune_moves_nothing():
    net = pruned_net()
    dense = nn.Linear(16, 32)
    net[0].load_state_dict(dense.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer)
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    zeros = zeros_of(net)
    wanda_ext.hold_masks(optimizer)
    momentum = optimizer.state[net[0].weight]["momentum_buffer"]
    assert not momentum[:, ::2].any() and momentum[:, 1::2].all()
    train(net, optimizer)
    assert_held(net, zeros)


def test_steps_that_write_whatever_they_like():
    class Noisy(torch.optim.Optimizer):
        def step(self, closure=None):
            with torch.no_grad():
                for weight in self.param_groups[0]["params"]:
                    weight.add_(1.0)
                    self.state[weight]["noise"] = torch.ones_like(weight)

    net = pruned_net()
    zeros = zeros_of(net)
    optimizer = Noisy(net.parameters(), {})
    wanda_ext.hold_masks(optimizer)
    optimizer.step()
    assert_held(net, zeros)
    noise = optimizer.state[net[0].weight]["noise"]
    assert torch.equal(noise == 0, zeros["0.weight"])
    assert optimizer.state[net[0].bias]["noise"].all()


def test_clipping_sees_what_is_trained_alone():
    net = pruned_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wanda_ext.hold_masks(optimizer)
    net(torch.randn(8, 16)).sum().backward()
    assert torch.equal(net[3].weight.grad == 0, net[3].weight == 0)


def test_gradient_scaling_skips_and_steps():
    net = pruned_net()
    zeros = zeros_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    wanda_ext.hold_masks(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = net[0].weight.detach().clone()
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.ones(8, 16)).float().mean() * scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net[0].weight, before) == (scale == float("inf"))
    assert_held(net, zeros)


def test_held_until_removed_and_only_what_was_asked():
    net = pruned_net()
    zeros = zeros_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with wanda_ext.hold_masks(optimizer, net[0]) as held:
        assert held.parameters == 1
        train(net, optimizer)
        assert torch.equal(net[0].weight == 0, zeros["0.weight"])
        assert net[3].weight.all()
    train(net, optimizer)
    assert net[0].weight.all()
    assert not net[0].weight._backward_hooks
    held.remove()  # twice does no harm
    with torch.no_grad():
        net[3].weight[0] = 0
    assert wanda_ext.hold_masks(optimizer, [net[3].weight]).zeros == 32


def test_a_state_that_was_saved_is_held_when_it_is_loaded():
    net = pruned_net()
    zeros = zeros_of(net)
    other = torch.optim.AdamW(pruned_net().parameters(), lr=0.1)
    train(net, optimizer := torch.optim.AdamW(net.parameters(), lr=0.1))
    with torch.no_grad():
        for name, zero in zeros.items():
            net.get_parameter(name).masked_fill_(zero, 0)
    other = torch.optim.AdamW(net.parameters(), lr=0.1)
    wanda_ext.hold_masks(other)
    other.load_state_dict(optimizer.state_dict())
    train(net, other)
    assert_held(net, zeros)


def test_bfloat16_and_frozen_weights():
    net = pruned_net(torch.bfloat16)
    net[3].weight.requires_grad_(False)
    zeros = zeros_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    assert wanda_ext.hold_masks(optimizer).parameters == 2
    train(net, optimizer)
    assert_held(net, zeros)


def test_refusals():
    net = pruned_net()
    with pytest.raises(TypeError, match="expected a torch optimizer, got Sequential"):
        wanda_ext.hold_masks(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of its weights holds a zero: prune the model"):
        wanda_ext.hold_masks(optimizer, net[1])
