"""lm-eval on models in memory: its scores against ours by hand, and equal for masked and packed."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_tasks import CHOICES, LINES, QUESTIONS, three_forms, write_tasks
from tiny_models import tiny_model, tiny_tokenizer

import wanda_ext
from wanda_ext.quality import tasks
from wanda_ext.quality.tasks import PRESETS, TaskReport, TaskScore, evaluate_tasks, find, run

lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
NAMES = "toy_choice,toy_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def forms() -> dict[str, Any]:
    return three_forms()


@pytest.fixture(scope="module")
def reports(folder: Path, forms: dict[str, Any]) -> dict[str, TaskReport]:
    found = find(NAMES, task_path=folder)
    return {name: run(model, tiny_tokenizer(), found) for name, model in forms.items()}


def log_likelihood(model: Any, context: str, continuation: str) -> float:
    """The sum of log p of the continuation's tokens, without any help of lm-eval."""
    tokenizer = tiny_tokenizer()
    before, ids = tokenizer(context).input_ids, tokenizer(context + continuation).input_ids
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(len(before), len(ids)))


def test_scores_are_those_of_the_model(forms: Any, reports: dict[str, TaskReport]) -> None:
    for name in ("dense", "masked"):
        right = [
            int(np.argmax([log_likelihood(forms[name], q, f" {c}") for c in CHOICES])) == answer
            for q, answer in QUESTIONS
        ]
        choice = reports[name]["toy_choice"]
        assert choice.scores["acc"] == pytest.approx(sum(right) / len(right))
        assert 0 < choice.stderr["acc"] < 1
        assert (choice.version, choice.num_fewshot, choice.samples) == ("2.0", 0, len(QUESTIONS))
        likelihood = sum(log_likelihood(forms[name], "<s>", line) for line in LINES)
        size = sum(map(len, LINES))
        bits = reports[name]["toy_text"].scores["bits_per_byte"]
        assert bits == pytest.approx(-likelihood / size / np.log(2), rel=1e-5)
    dense, masked = reports["dense"], reports["masked"]
    assert dense["toy_choice"].scores["acc"] != masked["toy_choice"].scores["acc"]


def test_masked_and_packed_score_the_same(reports: dict[str, TaskReport]) -> None:
    for task in NAMES.split(","):
        masked, packed = reports["masked"][task], reports["packed"][task]
        assert masked.scores.keys() == packed.scores.keys() and len(masked.scores) == 2
        for metric, value in masked.scores.items():
            exact = metric.startswith("acc")
            assert packed.scores[metric] == (value if exact else pytest.approx(value, rel=1e-5))


def test_the_report_reads_well(reports: dict[str, TaskReport]) -> None:
    report = reports["dense"]
    lines = str(report).splitlines()
    assert lines[0].split() == ["task", "version", "shots", "samples", "metric", "value", "stderr"]
    acc = report["toy_choice"].scores["acc"]
    assert lines[1].split()[:6] == ["toy_choice", "2.0", "0", "24", "acc", f"{acc:.4f}"]
    assert lines[2].split()[0] == "acc_norm"
    assert lines[-1] == f"lm-eval {report.versions['lm_eval']}, batch size 1"
    assert report.versions["wanda_ext"] == wanda_ext.__version__


def test_shots_limit_and_all_is_as_before(folder: Path) -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    tokenizer.pad_token = None
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    options: dict[str, Any] = {"num_fewshot": 1, "limit": 2, "batch_size": 2}
    report = evaluate_tasks(model, tokenizer, ["toy_choice"], task_path=folder, **options)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert (report["toy_choice"].num_fewshot, report["toy_choice"].samples) == (1, 2)
    assert "only the first 2 samples" in str(report)
    assert before == after and model.training and tokenizer.pad_token is None


def test_presets_are_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find("paper, mmlu")
    assert found.by_shots == {0: list(PRESETS["paper"][0]), 5: ["mmlu"]}
    assert set(PRESETS["paper"][0]) <= set(found.manager.all_subtasks)
    assert len(PRESETS["paper"][0]) == 7 and "mmlu" in found.manager.all_groups
    monkeypatch.setattr(tasks, "_manager", lambda *_: found.manager)
    assert find("paper", num_fewshot=2).by_shots == {2: list(PRESETS["paper"][0])}
    assert find("rte,boolq").by_shots == {None: ["rte", "boolq"]}


def test_a_group_and_filters_are_told_apart() -> None:
    found = {
        "results": {
            "a": {"alias": " - a", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.1},
            "b": {"alias": "b", "sample_len": 3, "em,strict": 0.5, "em_stderr,strict": "N/A"},
            "all": {"alias": "all", "sample_len": 4, "acc,none": 0.25},
        },
        "groups": {"all": {}},
        "versions": {"a": 1.0, "b": 2},
        "n-shot": {"a": 5},
    }
    group, a, b = tasks._scores(found)
    assert group == TaskScore("all", "-", 0, 4, {"acc": 0.25}, {}, group=True)
    assert a == TaskScore("a", "1.0", 5, 4, {"acc": 0.25}, {"acc": 0.1})
    assert b == TaskScore("b", "2", 0, 3, {"em,strict": 0.5}, {})


def test_the_mean_of_the_papers_seven() -> None:
    values = [i / 10 for i in range(7)]
    scores = [
        TaskScore(task, "1", 0, 9, {"acc": value}, {})
        for task, value in zip(PRESETS["paper"][0], values, strict=True)
    ]
    report = TaskReport(tuple(scores), None, 1, {"lm_eval": "0"})
    assert "mean acc of the paper's seven tasks: 0.3000" in str(report)
    assert "mean acc" not in str(TaskReport(tuple(scores[1:]), None, 1, {"lm_eval": "0"}))


@pytest.mark.parametrize(
    ("named", "options", "words"),
    [
        ("", {}, "expected names such as 'paper'"),
        ("toy_text", {"num_fewshot": -1}, "num_fewshot of at least 0"),
        ("toy_text,toy_text", {}, "toy_text would run twice"),
        ("paper,boolq", {}, "boolq would run twice"),
        ("toy_txt", {}, r"knows no 'toy_txt' \(near: toy_text"),
        ("toy_text", {"task_path": "nowhere"}, "directory of YAML files, got nowhere"),
        ("toy_text", {"limit": 0}, "at least 1 sample, got 0"),
        ("toy_text", {"batch_size": 0}, "at least 1 or 'auto', got 0"),
        ("toy_text", {"batch_size": "fast"}, "at least 1 or 'auto', got 'fast'"),
    ],
)
def test_refuses(folder: Path, named: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate_tasks(tiny_model(), tiny_tokenizer(), named, **{"task_path": folder} | options)


def test_refuses_models_and_tokenizers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find("toy_text", task_path=folder)
    with pytest.raises(TypeError, match="expected the model's, got NoneType"):
        run(tiny_model(), None, found)
    with pytest.raises(ValueError, match="meta device"):
        run(tiny_model().to("meta"), tiny_tokenizer(), found)
    monkeypatch.setattr(tasks, "launched", lambda: True)
    with pytest.raises(ValueError, match="start one"):
        run(tiny_model(), tiny_tokenizer(), found)


def test_names_the_extra_where_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'wanda_ext\[eval\]'"):
        find("paper")
