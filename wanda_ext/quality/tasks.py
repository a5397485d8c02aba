"""Scores on tasks, by EleutherAI's lm-eval, of a model in memory: dense, masked or packed alike.

`find` looks names up, so that a wrong one is refused before a model is loaded; `run` hands the
model to lm-eval as it is. `evaluate_tasks` is both. lm-eval is optional, the extra `eval`.
"""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from wanda_ext.models import preserved
from wanda_ext.report import versions
from wanda_ext.stream import launched

PAPER = "boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa"  # the Wanda paper's
ZERO_SHOT = tuple(PAPER.split())
PRESETS = {"paper": (ZERO_SHOT, 0), "mmlu": (("mmlu",), 5)}  # word -> tasks, num_fewshot


@dataclass(frozen=True)
class TaskScore:
    """What lm-eval found on one task, or on a group of them."""

    task: str
    version: str
    num_fewshot: int
    samples: int
    scores: dict[str, float]  # by metric: "acc", "acc_norm", "word_perplexity", ...
    stderr: dict[str, float]  # of the metrics that have one
    group: bool = False  # an aggregate of others, such as "mmlu"


@dataclass(frozen=True)
class TaskReport:
    """The scores of one model. str() is a table; `report["rte"].scores["acc"]` is one of them."""

    scores: tuple[TaskScore, ...]  # of groups first
    limit: int | None
    batch_size: int | str
    versions: dict[str, str]

    def __getitem__(self, task: str) -> TaskScore:
        return {score.task: score for score in self.scores}[task]

    def mean_acc(self) -> float:
        """The unweighted mean of "acc" over ZERO_SHOT. KeyError where one of them was not run."""
        return sum(self[task].scores["acc"] for task in ZERO_SHOT) / len(ZERO_SHOT)

    def __str__(self) -> str:
        rows = [("task", "version", "shots", "samples", "metric", "value", "stderr")]
        for score in self.scores:
            about = (score.task, score.version, str(score.num_fewshot), str(score.samples))
            for metric, value in score.scores.items():
                error = score.stderr.get(metric)
                told = "-" if error is None else f"{error:.4f}"
                rows.append((*about, metric, f"{value:.4f}", told))
                about = ("", "", "", "")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if {score.task for score in self.scores}.issuperset(ZERO_SHOT):
            lines.append(f"mean acc of the paper's seven tasks: {self.mean_acc():.4f}")
        if self.limit is not None:
            lines.append(f"only the first {self.limit} samples of each task: not comparable")
        lines.append(f"lm-eval {self.versions['lm_eval']}, batch size {self.batch_size}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found."""

    manager: Any  # lm-eval's, which loads them by name
    by_shots: dict[int | None, list[str]]  # num_fewshot (None: each its own) -> names


def find(
    tasks: str | Iterable[str],
    *,
    num_fewshot: int | None = None,
    task_path: str | Path | None = None,
) -> Tasks:
    """Looks up what `evaluate_tasks` takes, and raises what it raises for it."""
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in names if name.strip()]
    if not names or (num_fewshot or 0) < 0:
        raise ValueError(
            "tasks: expected names such as 'paper' or 'boolq,rte' and a num_fewshot of at least 0, "
            f"got {names} and {num_fewshot}"
        )
    by_shots: dict[int | None, list[str]] = {}
    for name in names:
        known, shots = PRESETS.get(name, ((name,), None))
        shots = shots if num_fewshot is None else num_fewshot
        by_shots.setdefault(shots, []).extend(known)
    wanted = [name for group in by_shots.values() for name in group]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {', '.join(twice)} would run twice; name each once")
    return Tasks(_manager(wanted, task_path), by_shots)


def run(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | str = 1,
) -> TaskReport:
    """Runs what `find` found, as `evaluate_tasks` says."""
    _check_run(model, tokenizer, limit, batch_size)
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM

    scores: list[TaskScore] = []
    with preserved(model), _quietly():
        # A copy, for lm-eval gives a tokenizer without a padding token one.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        for shots, names in tasks.by_shots.items():
            found = lm_eval.simple_evaluate(
                lm,
                tasks=names,
                num_fewshot=shots,
                limit=limit,
                task_manager=tasks.manager,
                log_samples=False,
            )
            scores += _scores(found)
    of_others = {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    return TaskReport(tuple(scores), limit, batch_size, versions() | of_others)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Iterable[str],
    *,
    num_fewshot: int | None = None,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | str = 1,
) -> TaskReport:
    """Scores of a model on tasks of lm-eval, which asks it for log-likelihoods where it stands.

    tasks: names of lm-eval, with commas between or in a list; "paper" stands for the Wanda paper's
        seven (boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa; zero-shot)
        and "mmlu" for MMLU with five shots.
    num_fewshot: examples before each question; None: as above, else as the task says.
    task_path: a directory of lm-eval's YAML files with tasks of your own.
    limit: take the first so many samples of each task, to try it.
    batch_size: requests a forward pass, or "auto". Padding may change the last digits.
    Training flags and random states are afterwards as they were.
    Raises: ImportError without lm-eval; ValueError for a name it does not know or for numbers out
            of range; OSError where a dataset is neither cached nor to be reached.
    """
    found = find(tasks, num_fewshot=num_fewshot, task_path=task_path)
    return run(model, tokenizer, found, limit=limit, batch_size=batch_size)


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(f"no lm-eval ({error}): pip install 'wanda_ext[eval]'") from error
    return lm_eval


def _manager(names: list[str], task_path: str | Path | None) -> Any:
    """lm-eval's index of tasks. Its own, thousands of files, is read only where it is needed."""
    new = _lm_eval().tasks.TaskManager
    if task_path is not None:
        if not Path(task_path).is_dir():
            raise ValueError(f"task_path: expected a directory of YAML files, got {task_path}")
        manager = new(include_path=str(task_path), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):  # a group could hold tasks of lm-eval's own
            return manager
    manager = new(include_path=None if task_path is None else str(task_path))
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none"
            raise ValueError(
                f"tasks: lm-eval knows no {name!r} (near: {near}); your own ones need a task_path"
            )
    return manager


def _check_run(model: nn.Module, tokenizer: Any, limit: int | None, batch_size: int | str) -> None:
    if launched():
        raise ValueError("tasks: one process runs them, but several were launched: start one")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected the model's, got {type(tokenizer).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: it has weights on the meta device; load them before evaluating")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 sample, got {limit}")
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise ValueError(f"batch_size: expected at least 1 or 'auto', got {batch_size!r}")


def _scores(found: Any) -> Iterator[TaskScore]:
    """From lm-eval's dict, whose keys of numbers are "metric,filter"; groups come first."""
    groups = found.get("groups", {})
    for name in sorted(found["results"], key=lambda name: name not in groups):
        entry = found["results"][name]
        scores: dict[str, float] = {}
        stderr: dict[str, float] = {}
        for key, value in entry.items():
            metric, comma, kind = key.partition(",")
            if not comma or not isinstance(value, (int, float)):  # "alias"; "N/A"
                continue
            plain = metric.removesuffix("_stderr")
            label = plain if kind == "none" else f"{plain},{kind}"
            (scores if plain == metric else stderr)[label] = float(value)
        yield TaskScore(
            task=name,
            version=str(found["versions"].get(name, "-")),
            num_fewshot=int(found["n-shot"].get(name, 0)),
            samples=int(entry["sample_len"]),
            scores=scores,
            stderr=stderr,
            group=name in groups,
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """No warnings of what we do on purpose (a model in memory, few-shot numbers of our own), and
    numpy's random state, which lm-eval seeds, is afterwards as it was."""
    import numpy as np

    logger, state = logging.getLogger("lm_eval"), np.random.get_state()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        np.random.set_state(state)
