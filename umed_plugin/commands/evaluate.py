"""``umed evaluate``: metrics of a checkpoint with confidence intervals, as a table and as JSON."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="metrics of a checkpoint with confidence intervals",
        description="Ask a checkpoint the questions of a recipe's records, greedily, and score the answers: accuracy, mean IoU, "
        "share of studies with IoU of at least 0.5, vision relevance; each with its 95 % bootstrap interval over studies.",
        epilog="example:\n  umed evaluate runs/llava-mistral-umed --benchmark demo_studies --data-root studies --out evaluation",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint, or a LoRA folder")
    parser.add_argument(
        "--benchmark",
        metavar="RECIPE_OR_JSON",
        required=True,
        help="a recipe (name or YAML), or records that `umed recipe build` wrote",
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="of the records (default: test)"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N records")
    parser.add_argument(
        "--template", help="of the prompt, e.g. mistral_instruct to ask as stock LLaVA does (default: by model)"
    )
    parser.add_argument("--base", metavar="CKPT", type=Path, help="of a LoRA folder (default: as the adapter says)")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder of the recipe's data set")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write evaluation.json and predictions.jsonl here")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="studies at a time (default: 16)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="longest answer (default: 128)")
    parser.add_argument(
        "--image-cache", metavar="DIR", type=Path, help="keep images decoded and resized here, for the next evaluation"
    )
    parser.add_argument(
        "--image-cache-gb", metavar="GB", type=float, default=20.0, help="most that it may hold (default: 20)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files."""
    with tempfile.TemporaryDirectory(prefix="umed-evaluate-") as folder:
        return _run(args, Path(args.out or folder))


def _run(args: argparse.Namespace, folder: Path) -> int:
    from rich.console import Console
    from rich.progress import track

    from umed_plugin.evaluate import evaluate
    from umed_plugin.patches import prepare_llava
    from umed_plugin.report import stages_table

    prepare_llava()

    console = Console()
    records, image_folder = _records(args, folder)
    bar = iter(track(range(len(records)), description="answering", console=console, transient=True))
    done = [next(bar, 0)]

    def advance(count: int, _total: int) -> None:
        while len(done) < count:
            done.append(next(bar, 0))

    found = evaluate(
        args.checkpoint,
        records,
        image_folder=image_folder,
        template=args.template,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        base=args.base,
        image_cache=args.image_cache,
        image_cache_gb=args.image_cache_gb,
        progress=advance,
    )
    next(bar, None)
    console.print(stages_table({args.checkpoint.name: found.metrics}))
    if args.out:
        found.save(args.out)
        console.print(f"written: {args.out / 'evaluation.json'}, {args.out / 'predictions.jsonl'}")
    return 0


def _records(args: argparse.Namespace, folder: Path) -> tuple[list[Any], Path]:
    """(records of the split, folder that their relative image paths start from)."""
    from umed_plugin.checkpoint import find_base, is_lora, read_config
    from umed_plugin.records import load_records

    if args.benchmark.endswith(".json"):
        records, image_folder = load_records(args.benchmark), Path(args.benchmark).resolve().parent
    else:
        from umed_plugin.build import build_records
        from umed_plugin.recipe import load_recipe

        checkpoint = find_base(args.checkpoint, args.base) if is_lora(args.checkpoint) else args.checkpoint
        mode = "pad" if read_config(checkpoint).get("image_aspect_ratio") == "pad" else "square"
        image_folder = folder / "data"
        records = build_records(
            load_recipe(args.benchmark),
            out_dir=image_folder,
            image_aspect_ratio=mode,
            split=args.split,
            data_root=args.data_root,
            # What is rendered into a folder of its own each time would never be found again.
            render=args.image_cache is None,
        )
    records = [record for record in records if record["split"] == args.split]
    return records[: args.limit] if args.limit else records, image_folder
