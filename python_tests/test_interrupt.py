"""Ctrl-C: where it lands, that none is lost, and what a prune stopped by it leaves behind."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids

from wanda_ext import prune_model
from wanda_ext.interrupt import held_back, step
from wanda_ext.prune import commit
from wanda_ext.runner import walk

QUIET = {"progress": False, "swap": False}


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_next_step() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back():
        ctrl_c()
        reached.append("after the signal")
        step()
        reached.append("after the step")
    assert reached == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_back():
        ctrl_c()
        reached.append("after the first")
        ctrl_c()
        reached.append("after the second")
    assert reached == ["after the first"]


def test_an_interrupt_without_a_step_after_it_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), held_back():
        ctrl_c()
    step()  # and is raised once


def test_another_handler_keeps_the_signal() -> None:
    seen = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with held_back():
            ctrl_c()
            step()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with held_back():
            step()
        done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 25])
def test_a_prune_stops_between_steps_and_restores_everything(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The signal comes inside the restoring code of one step and takes effect at the next."""
    count = 0
    whole = tiny_model()
    prune_model(whole, token_ids(), 0.5, **QUIET)

    def counted() -> None:
        nonlocal count
        step()
        count += 1
        if count == steps:
            ctrl_c()

    monkeypatch.setattr(walk, "step", counted)
    monkeypatch.setattr(commit, "step", counted)
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt) as raised:
        prune_model(model, token_ids(), 0.5, **QUIET)
    assert count == steps
    report: Any = raised.value.report  # type: ignore[attr-defined]
    done = {line.name.rpartition(".")[0].split(".")[2] for line in report.pruned}
    for name, tensor in model.state_dict().items():
        pruned = name.startswith("model.layers.") and name.split(".")[2] in done
        assert torch.equal(tensor, (whole.state_dict() if pruned else before)[name]), name
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
