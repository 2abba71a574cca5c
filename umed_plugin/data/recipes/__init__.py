"""Recipes: one YAML file per data set, read and validated into pydantic models."""
