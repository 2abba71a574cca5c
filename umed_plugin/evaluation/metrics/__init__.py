"""Metrics: pure functions from texts, boxes and likelihoods to numbers, and their confidence intervals.

- `umed_plugin.evaluation.metrics.metric`: a metric over scored questions, its bootstrap confidence interval, the paired
  difference of two runs
- `umed_plugin.evaluation.metrics.grounding`: boxes
- `umed_plugin.evaluation.metrics.llava_med`: LLaVA-Med's open recall and closed accuracy, and a corrected closed accuracy
- `umed_plugin.evaluation.metrics.choices`: multiple choice
- `umed_plugin.evaluation.metrics.captions`: BLEU, ROUGE-L, METEOR
- `umed_plugin.evaluation.metrics.classification`: AUC and ACC of class likelihoods

Which classes an answer names and how its boxes fit is decided in `umed_plugin.grounding.scoring`, the one scorer of rewards and
evaluation.
"""
