"""``umed convert``: LLaVA's layout <-> transformers' ``LlavaForConditionalGeneration``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``convert``."""
    parser = subparsers.add_parser(
        "convert",
        help="write a LLaVA checkpoint in transformers' form (for vLLM, TRL, ...), or back",
        description="Write a checkpoint of LLaVA's layout as transformers' LlavaForConditionalGeneration with its processor and "
        "chat template, which vLLM, TRL and others read; or such a folder in LLaVA's layout, which stock LLaVA loads. Which of "
        "the two CKPT is shows in its config.json. Logits stay the same.",
        epilog="examples:\n"
        "  umed convert checkpoints/llava-mistral-umed --template umed_mistral --out checkpoints/umed-hf\n"
        "  umed convert checkpoints/umed-hf --out checkpoints/llava-mistral-back",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint in either form")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the other form")
    parser.add_argument(
        "--template",
        help="conversation template that becomes the chat template, such as umed_mistral or umed_v1 (default: the one that stock "
        "LLaVA asks with); only into transformers' form",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what the next program has to know."""
    from umed_plugin.checkpoint import read_config
    from umed_plugin.errors import UsageError
    from umed_plugin.merging import stock_name_fault
    from umed_plugin.to_llava import is_transformers_form, to_llava
    from umed_plugin.to_transformers import STOCK_TEMPLATES, to_transformers

    if not is_transformers_form(args.checkpoint):
        out = to_transformers(args.checkpoint, args.out, template=args.template, overwrite=args.overwrite)
        asked = args.template or STOCK_TEMPLATES[read_config(args.checkpoint)["model_type"]]
        print(f"transformers' form: {out}\nchat template: {asked}")
        return 0
    if args.template:
        raise UsageError(
            f"--template {args.template}: {args.checkpoint} is in transformers' form already, and LLaVA's layout holds no "
            "template. Leave it out."
        )
    out = to_llava(args.checkpoint, args.out, overwrite=args.overwrite)
    print(f"LLaVA's layout: {out}")
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        print(f"note: {fault}")
    return 0
