"""``umed merge``: a LoRA folder and its base become a full checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``merge``."""
    parser = subparsers.add_parser(
        "merge",
        help="write a full checkpoint from a LoRA folder and its base",
        description="Write a full checkpoint that stock LLaVA loads. Tensor names, shapes, dtypes, config keys and tokenizer "
        "are the base's. Stock LLaVA chooses its loader by the folder's name: call it ...llava..., and ...llava...mistral... "
        "for a Mistral model.",
        epilog="example:\n  umed merge runs/stage2-lora --base runs/stage1 --out runs/llava-mistral-umed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lora_dir", metavar="LORA_DIR", type=Path, help="what training with --lora_enable True wrote")
    parser.add_argument(
        "--base", metavar="CKPT", type=Path, help="checkpoint it was trained on (default: as the adapter says)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the full checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and say what stock LLaVA would make of the folder's name."""
    from umed_plugin.checkpoint import read_config
    from umed_plugin.merging import merge, stock_name_fault

    out = merge(args.lora_dir, args.base, args.out, overwrite=args.overwrite)
    print(f"merged checkpoint: {out}")
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        print(f"note: {fault}")
    return 0
