"""Benchmarks by name: ``umed evaluate CKPT --benchmark NAME``.

A benchmark is a small file here with four parts, and a line in `umed_plugin.evaluation.benchmarks.catalogue`:

- how to read its records: ``questions(root, split, work)`` gives `Question`s in the order of the files;
- how to prompt: the text of each `Question`, and the options whose likelihood is asked for;
- how to score: ``score(question, answer)`` gives named numbers for one answer, by the pure functions of
  `umed_plugin.evaluation.metrics`;
- which figures: ``figures(rows)`` names the numbers that are reported, each a pure function of the scored questions.

Answers, batches, resuming, intervals, comparisons and files are the same for all: `umed_plugin.evaluation.runs`. The records of
a recipe (``mau``, a recipe or a JSON) are asked by `umed_plugin.evaluation.grounded`, which also looks at attention.
"""
