"""Checkpoints on disk: loading, merging an adapter, converting to and from transformers' form, prompt templates."""
