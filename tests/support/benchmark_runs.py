"""Benchmarks by ``umed evaluate``: the command line, its files, and figures of answers that are given."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
from umed_plugin.evaluation.metrics.figures import measure
from umed_plugin.evaluation.runs import scored
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


def figures_of(name, questions, answers, scorer=None):
    """Figures of a benchmark for answers that are given as texts, or as (text, losses)."""
    benchmark = BENCHMARKS[name]
    pairs = [answer if isinstance(answer, tuple) else (answer, []) for answer in answers]
    rows = [
        scored(benchmark, question, ModelAnswer(text, list(losses)), scorer or Scorer())
        for question, (text, losses) in zip(questions, pairs)
    ]
    return {key: found["value"] for key, found in measure(benchmark.figures(rows), rows).items()}


def picture(path, size=(60, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0]), dtype=np.uint8)).save(path)


def command(checkpoint, name, root, out, *more):
    return [
        "evaluate", str(checkpoint), "--benchmark", name, "--data-root", str(root), "--out", str(out),
        "--max-new-tokens", "6", *map(str, more),
    ]  # fmt: skip


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
