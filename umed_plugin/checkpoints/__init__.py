"""Checkpoints on disk: load, merge an adapter, convert to and from transformers' format, prompt templates."""
