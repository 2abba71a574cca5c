"""``umed recipe build R --out FILE``: the training JSON, with diagnoses from templates or from a vision model."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin.commands.numbers import seed
from umed_plugin.commands.outputs import check_file
from umed_plugin.commands.recipe.arguments import add_against, add_recipe_and_root
from umed_plugin.commands.recipe.sharing import add_sharing_flags, is_whole, joining, remove_marks
from umed_plugin.commands.recipe.writer_flags import add_writer_flags, read_writer_flags
from umed_plugin.errors import UmedError, UsageError, note, warn
from umed_plugin.grounding.answer_types import GROUNDED, NEGATIVE, PHRASE, REPORT
from umed_plugin.terminal.progress import add_quiet_flag

if TYPE_CHECKING:
    from umed_plugin.commands.recipe.writer_settings import WriterSettings
    from umed_plugin.data.records import Record
    from umed_plugin.data.writing.decisions import Decision
    from umed_plugin.pseudo_boxes import PseudoBoxes

# Of the file that a build replaces: more than its first record.
_BEGINNING_BYTES = 200_000


def add_parser(actions: argparse._SubParsersAction[Any]) -> None:
    """Add ``build`` to the actions of ``umed recipe``."""
    parser = actions.add_parser(
        "build",
        help="write the training JSON (and PNGs of images that LLaVA cannot read)",
        description="Write records as LLaVA's JSON. Images that LLaVA cannot read are rendered into images/ beside it. "
        "Train with --data_path FILE --image_folder FOLDER_OF_FILE.",
        epilog="example:\n  umed recipe build brain_tumor_coco --data-root data/brain_tumor_coco --split train "
        "--out built/train.json",
    )
    add_recipe_and_root(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--image-aspect-ratio",
        default="pad",
        choices=("pad", "square"),
        help="as in training: boxes are written in 0-1 of that square (default: pad)",
    )
    parser.add_argument(
        "--box-decimals", default=2, type=int, choices=(2, 3), help="decimals of box coordinates in text (default: 2)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="only this split (default: all)")
    parser.add_argument("--seed", default=0, type=seed, help="seed for the choice of wordings (default: 0)")
    parser.add_argument(
        "--on-bad-image",
        default="stop",
        choices=("stop", "skip"),
        help="stop at missing or unreadable images, or skip and report them (default: stop)",
    )
    add_against(parser, "left out")
    parser.add_argument(
        "--tower",
        type=Path,
        metavar="CKPT_OR_TOWER",
        help="checkpoint, or CLIP vision tower, whose anomaly map finds boxes for the recipe's pseudo_boxes; a contact sheet is "
        "written beside FILE",
    )
    add_sharing_flags(parser)
    add_writer_flags(parser)
    parser.add_argument(
        "--decisions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="reviewers' decisions, as downloaded from the pages of umed recipe review",
    )
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the records; exit status 1 if images are still without a diagnosis."""
    # Everything that may be wrong with the command line is reported before the first image is read.
    check_file("--out", args.out, "records.json")
    check_file("--ledger", args.ledger, "ledger.jsonl")
    writer = read_writer_flags(args)
    decisions = _decisions(args)
    _check_replaced(args.out, args.recipe)
    _check_tower(args)
    if not is_whole(args):
        return 0
    with joining(args) as is_ours:
        return _write(args, writer, decisions) if is_ours else 0


def _check_replaced(out: Path, recipe: str) -> None:
    """Say so if ``--out`` holds the records of another recipe, which will be replaced.

    Raises:
        UsageError: it holds something else than records, such as the annotations that are to be read.
    """
    from umed_plugin.data.recipes.recipe import load_recipe

    if not out.is_file() or not out.stat().st_size:
        return
    with out.open("rb") as file:
        beginning = file.read(_BEGINNING_BYTES).decode("utf-8", "replace")
    if "".join(beginning.split()) == "[]":
        return
    if not beginning.lstrip().startswith("[") or '"provenance"' not in beginning:
        raise UsageError(f"--out {out}: exists and does not hold records. Nothing was replaced. Give another name.")
    names = {*re.findall(r'"(?:recipe|mixture)"\s*:\s*"([^"]+)"', beginning)}
    if names and load_recipe(recipe).name not in names:
        warn(f"--out {out}: holds records of {', '.join(sorted(names)[:3])}, which will be replaced.")


def _check_tower(args: argparse.Namespace) -> None:
    """Refuse ``--tower`` where it has no effect, and a recipe that lacks it, before images are read."""
    from umed_plugin.data.prepared import has_pseudo_boxes
    from umed_plugin.data.recipes.recipe import load_recipe

    wanted = has_pseudo_boxes(load_recipe(args.recipe))
    if wanted and args.tower is None:
        raise UsageError(
            f"{args.recipe}: has pseudo_boxes, which are found by a vision tower. Give --tower CKPT: the checkpoint that will be "
            "trained, or a CLIP vision tower."
        )
    if args.tower is not None and not wanted:
        raise UsageError(f"--tower {args.tower}: has no effect, since {args.recipe} has no pseudo_boxes. Remove it.")


def _finder(args: argparse.Namespace) -> PseudoBoxes | None:
    from umed_plugin.pseudo_boxes import PseudoBoxes

    if args.tower is None:
        return None
    return PseudoBoxes(args.tower, args.out.parent, sheet=_sheet(args), shows_progress=not args.quiet)


def _sheet(args: argparse.Namespace) -> Path:
    out: Path = args.out
    return out.with_name(f"{out.stem}.pseudo_boxes.png")


def _write(args: argparse.Namespace, writer: WriterSettings | None, decisions: list[Decision]) -> int:
    from umed_plugin.commands.recipe.write import screened, tell_forecast, write_diagnoses
    from umed_plugin.data.build import with_probes
    from umed_plugin.data.recipes.recipe import load_recipe
    from umed_plugin.data.records import save_records

    records, complete = _build(args), True
    set_aside: list[Record] = []
    if writer is not None:
        records = screened(writer, records, args.out.parent)
        if writer.dry_run:
            tell_forecast(writer, records, args.out.parent)
            return 0
        records, set_aside, complete = write_diagnoses(writer, records, args.out.parent)
    records = with_decisions(records, set_aside, decisions, args.out)
    # Of the studies that remain, with the boxes that reviewers moved.
    records = with_probes(records, load_recipe(args.recipe), args.seed)
    save_records(records, args.out)
    remove_marks(args)
    _tell_result(args, records)
    return 0 if complete else 1


def _decisions(args: argparse.Namespace) -> list[Decision]:
    """The reviewers' decisions.

    Raises:
        UsageError: they would have no effect.
        UmedError: a file is wrong.
    """
    from umed_plugin.data.writing.decisions import read_decisions

    if args.decisions and args.dry_run:
        raise UsageError("--decisions: no effect with --dry-run.")
    return read_decisions(args.decisions)


def _build(args: argparse.Namespace) -> list[Record]:
    from umed_plugin.data.build import build_records
    from umed_plugin.data.recipes.recipe import load_recipe

    return build_records(
        load_recipe(args.recipe),
        out_dir=args.out.parent,
        image_aspect_ratio=args.image_aspect_ratio,
        box_decimals=args.box_decimals,
        seed=args.seed,
        split=args.split,
        data_root=args.data_root,
        on_bad_image=args.on_bad_image,
        against=args.against,
        progress=True,
        workers=args.workers,
        find_boxes=_finder(args),
        probes=False,
    )


def with_decisions(
    records: list[Record], set_aside: list[Record], decisions: list[Decision], out: Path
) -> list[Record]:
    """The records after review. Those still set aside go to a file beside ``out``, which is removed when none is left."""
    from umed_plugin.data.records import save_records
    from umed_plugin.data.writing.decisions import apply_decisions

    reviewed = apply_decisions(records, set_aside, decisions)
    file = out.with_name(f"{out.stem}.aside.json")
    if reviewed.set_aside:
        save_records(reviewed.set_aside, file)
        note(f"{len(reviewed.set_aside)} records set aside, with their faults: {file}")
        note(f"review them with: umed recipe review {shlex.quote(str(out))}")
    elif file.is_file():
        file.unlink()
    if decisions:
        _tell_decisions(reviewed.counts)
        _tell_agreement(decisions)
    return reviewed.records


def _tell_decisions(counts: dict[str, int]) -> None:
    note(f"reviewed: {counts['accept']} accepted, {counts['edit']} edited, {counts['reject']} rejected")
    if counts["stale"]:
        note(f"{counts['stale']} decisions are about a text that has changed since, and were not used")
    if counts["unknown"]:
        note(f"{counts['unknown']} decisions name no record of this build, and were not used")


def _tell_agreement(decisions: list[Decision]) -> None:
    """Of several reviewers, how far each pair agrees."""
    from umed_plugin.commands.recipe.agreement import kappa_in_words
    from umed_plugin.data.writing.agreement import measure, reviewer_of

    own = [decision for decision in decisions if not decision.settles]
    if len({reviewer_of(decision) for decision in own}) < 2:
        return
    try:
        found = measure(own)
    except UmedError as error:  # one reviewer decided twice; the build takes such files
        note(f"no kappa: {error}")
        return
    for pair in found.pairs:
        note(f"Cohen's kappa of {pair.first} and {pair.second}: {kappa_in_words(pair.kappa, pair.texts)}")
    if found.disagreements:
        note(f"they disagree on {len(found.disagreements)} texts; list them with: umed recipe agreement FILE FILE ...")


def _tell_result(args: argparse.Namespace, records: list[Record]) -> None:
    from umed_plugin.data.records import with_pseudo_boxes

    counts = Counter(record["answer_type"] for record in records)
    kinds = {PHRASE: "phrases", REPORT: "reports", "probe": "probes and controls"}
    others = "".join(f", {counts[kind]} {named}" for kind, named in kinds.items() if counts[kind])
    note(f"{args.out}: {len(records)} records, {counts[GROUNDED]} with lesions, {counts[NEGATIVE]} without{others}")
    if args.tower is not None:
        pseudo = len(with_pseudo_boxes(records))
        note(
            f"{pseudo} of the records have pseudo-boxes, which no person drew. Look at {_sheet(args)} before you train."
        )
    flags = (
        "--data_path",
        args.out,
        "--image_folder",
        args.out.parent,
        "--image_aspect_ratio",
        args.image_aspect_ratio,
    )
    note(f"train with: {shlex.join(map(str, flags))}")
