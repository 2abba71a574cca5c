"""The splits of a data set, as recipes and records name them."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# What the files of data sets call them.
SPLIT_NAMES: dict[str, Split] = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}
