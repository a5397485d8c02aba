"""Runs a model block by block and sees what enters each linear.

Blocks run alone where the model only passes hidden states between them, else in lock-step inside
the model's own forward. What knows hooks, captured calls or sums over inputs enters here; nothing
in this room changes a weight.
"""

from __future__ import annotations

from wanda_ext.runner.capture import PROBE_TOKENS, GlueError, hidden_of
from wanda_ext.runner.inputs import BatchSums, kernel_device
from wanda_ext.runner.lockstep import started, walking
from wanda_ext.runner.stages import TwoStreams, two_streams
from wanda_ext.runner.walk import Walk

__all__ = [
    "PROBE_TOKENS",
    "BatchSums",
    "GlueError",
    "TwoStreams",
    "Walk",
    "hidden_of",
    "kernel_device",
    "started",
    "two_streams",
    "walking",
]
