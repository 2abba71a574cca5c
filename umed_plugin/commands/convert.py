"""``umed convert``: LLaVA's layout <-> transformers' ``LlavaForConditionalGeneration``, or its language model alone."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from umed_plugin.errors import say
from umed_plugin.terminal.progress import add_quiet_flag, progress


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``convert``."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a LLaVA checkpoint to transformers' form (for vLLM, TRL, ...), or back",
        description="Convert a checkpoint in LLaVA's layout to transformers' LlavaForConditionalGeneration with its processor "
        "and chat template, which vLLM, TRL and others read; or convert such a folder to LLaVA's layout, for stock LLaVA. The "
        "direction follows from CKPT's config.json. Logits stay the same. --language-model-only writes plain Mistral or "
        "Llama, for `umed rollout-server`.",
        epilog="examples:\n"
        "  umed convert checkpoints/llava-mistral-umed --template umed_mistral --out checkpoints/umed-hf\n"
        "  umed convert checkpoints/umed-hf --out checkpoints/llava-mistral-back\n"
        "  umed convert checkpoints/llava-mistral-stage1 --language-model-only --out checkpoints/stage1-language-model",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint in either form")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the other form")
    parser.add_argument(
        "--template",
        help="conversation template for the chat template, such as umed_mistral or umed_v1 (default: the one that stock LLaVA "
        "uses); only to transformers' form",
    )
    parser.add_argument(
        "--language-model-only",
        action="store_true",
        help="write the language model without vision tower and projector, as plain Mistral or Llama",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and report what other programs have to know."""
    from umed_plugin.checkpoints.prompt_templates import check_template
    from umed_plugin.checkpoints.to_llava import is_transformers_form

    check_template(args.template)
    if args.language_model_only:
        return _to_language_model(args)
    return _to_llava(args) if is_transformers_form(args.checkpoint) else _to_transformers(args)


def _to_transformers(args: argparse.Namespace) -> int:
    from umed_plugin.checkpoints.folder import STOCK_TEMPLATES, read_config
    from umed_plugin.checkpoints.prompt_templates import warn_of_other_family
    from umed_plugin.checkpoints.to_transformers import to_transformers
    from umed_plugin.errors import note

    with progress("writing transformers' form", "byte") as advance:
        out = to_transformers(
            args.checkpoint, args.out, template=args.template, overwrite=args.overwrite, progress=advance
        )
    config = read_config(args.checkpoint)
    warn_of_other_family(args.template, config["model_type"])
    say(f"transformers' form: {out}\nchat template: {args.template or STOCK_TEMPLATES[config['model_type']]}")
    if config.get("mm_projector_type", "linear") == "linear":
        note(
            "the projector is linear. transformers reads it (projector_hidden_act: linear); vLLM refuses the activation. Other "
            "programs may use GELU whatever config.json says."
        )
    return 0


def _to_language_model(args: argparse.Namespace) -> int:
    from umed_plugin.checkpoints.language_model import to_language_model
    from umed_plugin.errors import UsageError

    if args.template:
        raise UsageError(
            f"--template {args.template} has no effect with --language-model-only: the server gets embedded prompts. Remove it."
        )
    with progress("writing the language model", "byte") as advance:
        out = to_language_model(args.checkpoint, args.out, overwrite=args.overwrite, progress=advance)
    say(f"language model: {out}\nserve it with: umed rollout-server {shlex.quote(str(out))}")
    return 0


def _to_llava(args: argparse.Namespace) -> int:
    from umed_plugin.checkpoints.folder import read_config
    from umed_plugin.checkpoints.to_llava import to_llava
    from umed_plugin.checkpoints.writing import stock_name_fault
    from umed_plugin.commands.doctor.examination import errors_of_result
    from umed_plugin.errors import UsageError, note

    if args.template:
        raise UsageError(
            f"--template {args.template}: {args.checkpoint} is in transformers' form already, and LLaVA's layout has no "
            "template. Remove --template."
        )
    with progress("writing LLaVA's layout", "byte") as advance:
        out = to_llava(args.checkpoint, args.out, overwrite=args.overwrite, progress=advance)
    say(f"LLaVA's layout: {out}")
    fault = stock_name_fault(out, read_config(out)["model_type"])
    if fault:
        note(fault)
    return 1 if errors_of_result(out, args.checkpoint) else 0
