"""``umed convert``: LLaVA's layout <-> transformers' ``LlavaForConditionalGeneration``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    from umed_plugin.checkpoints.to_llava import is_transformers_form

    return _back(args) if is_transformers_form(args.checkpoint) else _there(args)


def _there(args: argparse.Namespace) -> int:
    from umed_plugin.checkpoints.loading import STOCK_TEMPLATES, read_config
    from umed_plugin.checkpoints.to_transformers import to_transformers

    with _bar("writing transformers' form") as progress:
        out = to_transformers(
            args.checkpoint, args.out, template=args.template, overwrite=args.overwrite, progress=progress
        )
    config = read_config(args.checkpoint)
    print(f"transformers' form: {out}\nchat template: {args.template or STOCK_TEMPLATES[config['model_type']]}")
    if config.get("mm_projector_type", "linear") == "linear":
        print(
            "note: the projector is linear, which transformers reads (projector_hidden_act: linear) and vLLM does not: it "
            "refuses the activation. Other programs may take GELU whatever config.json says."
        )
    return 0


def _back(args: argparse.Namespace) -> int:
    from umed_plugin.checkpoints.loading import read_config
    from umed_plugin.checkpoints.merging import stock_name_fault
    from umed_plugin.checkpoints.to_llava import to_llava
    from umed_plugin.errors import UsageError

    if args.template:
        raise UsageError(
            f"--template {args.template}: {args.checkpoint} is in transformers' form already, and LLaVA's layout holds no "
            "template. Leave it out."
        )
    with _bar("writing LLaVA's layout") as progress:
        out = to_llava(args.checkpoint, args.out, overwrite=args.overwrite, progress=progress)
    print(f"LLaVA's layout: {out}")
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        print(f"note: {fault}")
    return 0


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes, on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
