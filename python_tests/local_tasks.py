"""Two tasks for lm-eval in files of a test, and a tiny model dense, masked and packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_model, tiny_tokenizer

import wanda_ext

CHOICES = ["red", "sky", "top"]
QUESTIONS = [(f"Of {i} * {i * 7}, which{'?' * (i % 5)}", i % 3) for i in range(24)]  # answer last
CHOICE = """\
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/choice.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
metadata: {{version: 2.0}}
"""
TEXT = """\
task: toy_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
LINES = [f"The {word} of a short story" for word in ("start", "middle", "end")]


def write_tasks(folder: Path) -> Path:
    """toy_choice, of QUESTIONS, and toy_text, of LINES."""
    questions = [{"question": q, "choices": CHOICES, "answer": answer} for q, answer in QUESTIONS]
    rows = {"choice": questions, "text": [{"text": line} for line in LINES]}
    for name, template in (("choice", CHOICE), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(template.format(folder=folder.as_posix()))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return folder


def three_forms() -> dict[str, Any]:
    """One model as it was, pruned 2:4 with its zeros in place, and the same packed."""
    dense = tiny_model()
    masked = copy.deepcopy(dense)
    text = [" ".join(f"word{i} of line {i % 7}" for i in range(200))]
    options = {"nsamples": 4, "seqlen": 32, "swap": False, "progress": False}
    wanda_ext.prune_model(masked, text, "2:4", tokenizer=tiny_tokenizer(), **options)
    packed = copy.deepcopy(masked)
    wanda_ext.swap_linears(packed)
    return {"dense": dense, "masked": masked, "packed": packed}
