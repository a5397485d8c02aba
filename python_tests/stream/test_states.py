"""Hidden states in files: two generations, resumed and interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wanda_ext.stream.states import FileStates


def rows(states: FileStates) -> list[float]:
    return [float(state.flatten()[0]) for state in states]


def filled(folder: Path) -> FileStates:
    states = FileStates(folder, [0, 2, 4])
    for value in range(3):
        states.append(torch.full((2, value + 1, 4), float(value), dtype=torch.bfloat16))
    return states


def test_what_is_put_in_is_read_after_the_turn(tmp_path: Path) -> None:
    states = filled(tmp_path)
    for index, state in enumerate(states):
        assert state.shape == (2, index + 1, 4) and state.dtype == torch.bfloat16
        states[index] = state + 10
    assert rows(states) == [0, 1, 2]
    states.turn()
    assert rows(states) == [10, 11, 12] and len(states) == 3
    states[1] = torch.full((2, 2, 4), 5.0)
    states.turn()
    assert rows(states) == [10, 5, 12]  # batches for which the model skips the block stay


def test_a_generation_that_was_not_finished_is_forgotten(tmp_path: Path) -> None:
    states = filled(tmp_path)
    for index in range(3):
        states[index] = torch.full((1,), 10.0 + index)
    states.turn()
    states[0] = torch.full((1,), 99.0)
    again = FileStates(tmp_path, [0, 2, 4], begun=1)
    for _ in range(3):
        again.append(torch.zeros(1))  # what a new capture finds
    assert rows(again) == [10, 11, 12]


def test_ranks_find_each_others_batches(tmp_path: Path) -> None:
    filled(tmp_path)
    alone = FileStates(tmp_path, [4, 0], begun=2)
    alone.append(torch.zeros(1))
    alone.append(torch.zeros(1))
    assert rows(alone) == [2, 0]


def test_states_stay_in_their_places(tmp_path: Path) -> None:
    states = filled(tmp_path)
    with pytest.raises(TypeError, match="never removed"):
        del states[0]
    with pytest.raises(TypeError, match="never inserted"):
        states.insert(0, torch.zeros(1))
