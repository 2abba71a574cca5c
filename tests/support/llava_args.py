"""LLaVA's argument objects, as ``umed-run`` sees them."""

from __future__ import annotations

from types import SimpleNamespace


def llava_args(**changes):
    """LLaVA's three argument objects in one, as they are in a run that works."""
    stock = {
        "data_path": __file__,
        "image_folder": None,
        "image_aspect_ratio": "pad",
        "vision_tower": "tower",
        "deepspeed": None,
        "fsdp": [],
        "evaluation_strategy": "no",
    }
    return [SimpleNamespace(**{**stock, **changes})] * 3


def parse(flags: list[str]):
    """LLaVA's three argument objects, as `train()` gets them under the patches."""
    from llava.train import train as llava_train

    classes = (llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments)
    return llava_train.transformers.HfArgumentParser(classes).parse_args_into_dataclasses(flags)
