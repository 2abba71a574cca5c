"""The ``--umed_*`` flags that LLaVA's training scripts get: their definition, and the checks before the model is loaded.

This package imports the standard library alone: under ``umed-run`` every process that uses LLaVA loads it.
"""
