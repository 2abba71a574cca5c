"""``umed merge``: what training wrote, LoRA or full, becomes a checkpoint in the layout of the one that it began with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``merge``."""
    parser = subparsers.add_parser(
        "merge",
        help="write a checkpoint in its base's layout from what training wrote, LoRA or full",
        description="Write a full checkpoint that stock LLaVA loads, from a LoRA folder and its base, or from what full "
        "fine-tuning wrote and the checkpoint that it began with. Tensor names, shapes, dtypes, config keys and tokenizer are "
        "the base's. Stock LLaVA chooses its loader by the folder's name: call it ...llava..., and ...llava...mistral... "
        "for a Mistral model.",
        epilog="example:\n  umed merge runs/stage2-lora --base runs/stage1 --out runs/llava-mistral-umed",
    )
    parser.add_argument("trained", metavar="TRAINED", type=Path, help="--output_dir of the training")
    parser.add_argument(
        "--base", metavar="CKPT", type=Path, help="checkpoint it was trained on (default, of LoRA: as the adapter says)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the full checkpoint")
    parser.add_argument(
        "--with-tower",
        action="store_true",
        help="copy the vision tower into DIR too, where it is a folder on this machine",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and say what stock LLaVA would make of the folder's name."""
    from umed_plugin.checkpoints.loading import is_lora, read_config
    from umed_plugin.checkpoints.merging import export, merge, stock_name_fault

    how = {"with_tower": args.with_tower, "overwrite": args.overwrite}
    if is_lora(args.trained):
        out = merge(args.trained, args.base, args.out, **how)
    elif args.base is None:
        raise UsageError(
            f"{args.trained}: no LoRA folder. For what full fine-tuning wrote, give the checkpoint it began with: --base CKPT"
        )
    else:
        out = export(args.trained, args.out, like=args.base, **how)
    print(f"checkpoint: {out}")
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        print(f"note: {fault}")
    return 0
