"""Benchmarks by ``umed evaluate``: the command line, its files, and metrics of given answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.evaluation_run import predicted
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


def metrics_of(name, questions, answers, scorer=None):
    """Metrics of a benchmark for answers that are given as texts, or as (text, losses)."""
    benchmark = BENCHMARKS[name]
    pairs = [answer if isinstance(answer, tuple) else (answer, []) for answer in answers]
    rows = [
        predicted(benchmark, question, ModelAnswer(text, list(losses)), scorer or Scorer()).row()
        for question, (text, losses) in zip(questions, pairs)
    ]
    return {key: found["value"] for key, found in measure(benchmark.metrics(rows), rows).items()}


def picture(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0) -> None:
    """Write a grey image of noise, of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8)).save(path)


def command(checkpoint: Path, name: str, root: Path, out: Path, *more: object) -> list[str]:
    """The words behind ``umed`` for a short evaluation."""
    return [
        "evaluate", str(checkpoint), "--benchmark", name, "--data-root", str(root), "--out", str(out),
        "--max-new-tokens", "6", *map(str, more),
    ]  # fmt: skip


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def rad(folder, count=6):
    """VQA-RAD's form: two questions about each image, open and closed, and a training question."""
    records = []
    for index in range(count):
        picture(folder / "VQA_RAD Image Folder" / f"synpic{index // 2}.jpg", seed=index // 2)
        closed = index % 2 == 1
        records.append(
            {
                "qid": index,
                "image_name": f"synpic{index // 2}.jpg",
                "question": "Is it normal?" if closed else "What is shown?",
                "answer": ("No" if index == 1 else "yes") if closed else "left lung",
                "answer_type": "CLOSED " if closed else "OPEN",
                "phrase_type": "test_freeform" if index % 3 else "test_para",
            }
        )
    records.append({**records[0], "qid": 99, "phrase_type": "freeform"})
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))
    return folder
