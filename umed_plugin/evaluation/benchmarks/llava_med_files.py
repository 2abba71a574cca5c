"""Answers and truth in the files that LLaVA-Med's ``run_eval.py`` and ``run_eval_batch.py`` take.

``python run_eval.py --gt test.json --pred answers.jsonl --candidate candidate.json``: both lists must hold the same ids in the
same order. Each answer needs the keys that its ``model_vqa.py`` writes, and each truth ``answer_type`` and two turns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.evaluation.benchmarks.benchmark import BenchmarkQuestion
from umed_plugin.model.answerer import ModelAnswer


def save_for_llava_med(
    checkpoint: str,
    benchmark: str,
    questions: Sequence[BenchmarkQuestion],
    answers: Mapping[str, ModelAnswer],
    candidates: Sequence[str],
    folder: Path,
) -> None:
    """Write ``answers.jsonl``, ``test.json`` and, if there are candidates, ``candidate.json``.

    Args:
        checkpoint: its folder's name becomes ``model_id``.
        benchmark: part of what ``answer_id`` is made from. Theirs is random; this one is the same for the same question.
        questions: those without a written answer are left out.
        answers: by question id.
        candidates: the training split's open answers, which their "open accuracy" chooses among.
        folder: made if need be.
    """
    folder.mkdir(exist_ok=True)
    model = Path(checkpoint).name
    asked = [question for question in questions if question.write]
    lines: list[dict[str, Any]] = [
        {
            "question_id": question.id,
            "prompt": question.text,
            "text": answers[question.id].text,
            "answer_id": _answer_id(f"{benchmark} {model} {question.id}"),
            "model_id": model,
            "metadata": {},
        }
        for question in asked
    ]
    truth = [
        {
            "id": question.id,
            "image": os.path.basename(question.image),
            "answer_type": question.groups.get("answer_type", "OPEN"),
            "conversations": [
                {"from": "human", "value": f"{question.text}\n<image>"},
                {"from": "gpt", "value": question.truth},
            ],
        }
        for question in asked
    ]
    files.write_json_lines(folder / "answers.jsonl", lines)
    files.write_json(folder / "test.json", truth)
    if candidates:
        # Under "0", as their scripts look it up.
        files.write_json(folder / "candidate.json", {"0": sorted(set(candidates))}, indent=None)


def _answer_id(made_from: str) -> str:
    # Names of files stand in it, which need not be UTF-8.
    return hashlib.sha256(made_from.encode(errors="backslashreplace")).hexdigest()[:22]
