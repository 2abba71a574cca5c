"""``umed merge``: from the output of a training, LoRA or full, to a checkpoint in the layout of the one it began with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from umed_plugin.errors import UsageError, note, say
from umed_plugin.terminal.progress import add_quiet_flag, progress


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``merge``."""
    parser = subparsers.add_parser(
        "merge",
        help="merge a LoRA training, or export a full one, in the layout of its base",
        description="Write a full checkpoint that stock LLaVA loads: from a LoRA folder and its base, or from the output of full "
        "fine-tuning and the checkpoint with which it began. Tensor names, shapes, dtypes, config keys and tokenizer are the "
        "base's. Stock LLaVA chooses its loader by the folder's name: call it ...llava..., and ...llava...mistral... "
        "for a Mistral model.",
        epilog="example:\n  umed merge runs/stage2-lora --base runs/stage1 --out runs/llava-mistral-umed",
    )
    parser.add_argument("trained", metavar="TRAINED", type=Path, help="--output_dir of the training")
    parser.add_argument(
        "--base",
        metavar="CKPT",
        type=Path,
        help="checkpoint on which it was trained (default for LoRA: the one that the adapter names)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the full checkpoint")
    parser.add_argument(
        "--with-tower",
        action="store_true",
        help="also copy the vision tower into DIR, if it is a folder on this machine",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of all weights (default: that of the base). 16 bits lose small changes; the command says how much it keeps",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge, and report how stock LLaVA would load a folder of that name."""
    from umed_plugin.checkpoints.exporting import export
    from umed_plugin.checkpoints.folder import is_lora, read_config
    from umed_plugin.checkpoints.kept_share import KeptShare
    from umed_plugin.checkpoints.merging import merge, trained_bits
    from umed_plugin.checkpoints.writing import stock_name_fault
    from umed_plugin.commands.doctor.examination import errors_of_result

    kept = KeptShare()
    options = {"with_tower": args.with_tower, "overwrite": args.overwrite, "dtype": args.dtype, "kept": kept}
    parts = is_lora(args.trained) or _is_projector(args.trained)
    if not parts and args.base is None:
        raise UsageError(
            f"{args.trained}: is not a LoRA folder. For the output of full fine-tuning, pass the checkpoint with which it began: "
            "--base CKPT"
        )
    with progress("writing the full checkpoint", "file") as advance:
        if parts:
            out = merge(args.trained, args.base, args.out, progress=advance, **options)
        else:
            out = export(args.trained, args.out, like=args.base, progress=advance, **options)
    say(f"checkpoint: {out}")
    if parts and trained_bits(args.trained) < 16:
        note(
            f"the adapter was trained over weights of {trained_bits(args.trained)} bits (--bits) and is now added to those of "
            "the base, which differ a little. Evaluate the merged checkpoint."
        )
    kept.report()
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        note(fault)
    return 1 if errors_of_result(out, args.base or args.trained) else 0


def _is_projector(folder: Path) -> bool:
    """Whether the folder holds the output of ``--tune_mm_mlp_adapter True``: a projector, and no model."""
    from umed_plugin.checkpoints.folder import PROJECTOR

    whole = any(folder.glob("*model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return (folder / PROJECTOR).is_file() and not whole
