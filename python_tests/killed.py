"""Runs prune_checkpoint in forked children that die: killed at a chosen step, or after a while.

`python killed.py SRC WORK CASE OPTIONS`: prints how many children died, and raises where a
checkpoint that one of them left, or that a later run finished, is not the reference byte for byte.
Parents never compute, so that their children can: threads do not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from streamed import contents
from tiny_models import token_ids

import wanda_ext

DURABLE = ("fsync", "rename", "mkdir", "unlink", "rmdir")  # of os: what makes steps


def child(src: Path, dst: Path, options: dict[str, Any], before: Any = lambda: None) -> int:
    """Forks a process that prunes; its exit status is 0 where it was done."""
    pid = os.fork()
    if not pid:
        try:
            before()
            ids = token_ids()
            wanda_ext.prune_checkpoint(src, dst, ids, progress=False, batch_size=4, **options)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def died(pid: int) -> bool:
    """Waits for a child. True: it was killed; False: it was done."""
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def kill_at(count: int) -> Any:
    """Ends the process in front of the count-th call that makes a step durable."""

    def prepare() -> None:
        left = [count]

        def counted(function: Any) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **named)

            return call

        for name in DURABLE:
            setattr(os, name, counted(getattr(os, name)))

    return prepare


def check(dst: Path, expected: dict[str, bytes]) -> None:
    assert contents(dst) == expected
    left = sorted(path.name for path in dst.parent.iterdir() if ".old" not in path.name)
    assert left == [dst.name], left
    assert len(wanda_ext.PruneReport.load(dst / "report.json").pruned) == 2 * 7


def every_step(src: Path, work: Path, options: dict[str, Any], expected: dict[str, bytes]) -> int:
    """Kills one run at each of its durable steps, and lets a second one finish it."""
    count = 0
    while True:
        dst = work / str(count) / "dst"
        dst.parent.mkdir()
        if not died(child(src, dst, options, kill_at(count + 1))):
            check(dst, expected)
            return count
        count += 1
        if dst.exists():  # complete, or not there
            assert contents(dst) == expected
        assert not died(child(src, dst, options))
        check(dst, expected)
        shutil.rmtree(dst.parent)


def any_moment(src: Path, work: Path, options: dict[str, Any], expected: dict[str, bytes]) -> int:
    """Kills runs after random times; each goes on where the one before was killed."""
    rng, dst, deaths, finished = random.Random(0), work / "dst", 0, 0
    start = time.perf_counter()
    assert not died(child(src, dst, options))
    whole = time.perf_counter() - start
    shutil.rmtree(dst)
    while deaths < 20 or not finished:
        pid = child(src, dst, options)
        time.sleep(rng.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        if died(pid):
            deaths += 1
            whole *= 1.1  # a machine that became slower must get on too
            if dst.exists():
                assert contents(dst) == expected
        else:
            finished += 1
            whole *= 0.6  # most runs are to be killed
            check(dst, expected)
            shutil.rmtree(dst)
    return deaths


def full_disk(src: Path, work: Path, options: dict[str, Any], expected: dict[str, bytes]) -> int:
    """Runs with room for ever larger files, until one is done."""

    def limit(size: int) -> Any:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    dst, failures = work / "dst", 0
    for size in (1000, 20_000, 60_000, 131_000, 1 << 30):
        status = os.waitpid(child(src, dst, options, limit(size)), 0)[1]
        assert not os.WIFSIGNALED(status)
        failures += os.WEXITSTATUS(status)
        assert dst.exists() == (size == 1 << 30)
    check(dst, expected)
    return failures


def main() -> None:
    src, work, case, given = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    options = json.loads(given)
    work.mkdir()
    assert not died(child(src, work / "reference" / "dst", options))
    expected = contents(work / "reference" / "dst")
    cases = {"every step": every_step, "any moment": any_moment, "full disk": full_disk}
    folder = work / "runs"
    folder.mkdir()
    print(cases[case](src, folder, options, expected))


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401  once, for all children

    torch.set_num_threads(1)
    main()
