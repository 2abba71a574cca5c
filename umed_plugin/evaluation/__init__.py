"""Evaluation of checkpoints: ``umed evaluate CKPT --benchmark NAME``.

A benchmark is one file in `umed_plugin.evaluation.benchmarks`, found by itself, that ends with ``BENCHMARK = Benchmark(...)``:

- how to read its questions: ``questions(root, split, work)`` gives `BenchmarkQuestion`s in the order of the files;
- how to prompt: the text of each question, and the options whose likelihood is computed;
- how to score: ``score(question, answer, scorer)`` gives named numbers for one answer, computed by the pure functions of
  `umed_plugin.evaluation.metrics`;
- what to report: ``metrics(rows)`` names the metrics, each a pure function of the scored questions.

Everything else is the same for all benchmarks, the records of a recipe among them: which questions are asked
(`umed_plugin.evaluation.questions`), answers in batches that survive a crash, scores and confidence intervals
(`umed_plugin.evaluation.evaluator`), files and paired comparison (`umed_plugin.evaluation.results`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umed_plugin.evaluation.evaluator import evaluate
    from umed_plugin.evaluation.results import compare

__all__ = ["compare", "evaluate"]

_MODULES = {"evaluate": "umed_plugin.evaluation.evaluator", "compare": "umed_plugin.evaluation.results"}


def __getattr__(name: str) -> Any:
    """Import `evaluate` or `compare` when it is first used: the benchmarks import this package for its metrics alone."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
