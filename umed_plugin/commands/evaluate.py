"""``umed evaluate``: metrics of a checkpoint with confidence intervals, as a table and as JSON."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umed_plugin import files
from umed_plugin.commands.machine import add_dtype_flag
from umed_plugin.commands.similar_flags import add_similar_flags, check_similar_flags
from umed_plugin.errors import UmedError, UsageError, note, warn
from umed_plugin.remote.settings import ROLLOUT_MAX_DIFFERENCE
from umed_plugin.terminal.console import console as make_console
from umed_plugin.terminal.progress import add_quiet_flag, progress
from umed_plugin.terminal.text import one_line

if TYPE_CHECKING:
    from umed_plugin.data.shards import Shard
    from umed_plugin.evaluation.results import Evaluation
    from umed_plugin.grounding.dialects import BoxDialect
    from umed_plugin.remote.rollout_server import RolloutServer

# Options that are fields of `EvaluationSettings` by the same name.
_SETTINGS = (
    "base", "template", "device", "dtype", "batch_size", "max_new_tokens", "image_cache", "image_cache_gb", "on_bad_image",
    "give_box",
    "pseudo_boxes",
    "server_adapters",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``evaluate``."""
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS, OF_RECIPES

    parser = subparsers.add_parser(
        "evaluate",
        help="metrics of a checkpoint on a benchmark, with confidence intervals",
        description="Ask a LLaVA checkpoint the questions of a benchmark, greedily, and score the answers. Every metric is "
        "reported with n and a 95 % bootstrap confidence interval, resampled by patient where patients are known, else by image. "
        "The records of a recipe (such as 'mau') are scored by diagnosis, boxes and attention; named benchmarks by their own "
        "metrics. With --out, the same command continues a run that was killed. Several processes share the questions under "
        "torchrun or accelerate launch, or with --shard; all write to the same --out.",
        epilog="examples:\n"
        "  umed evaluate runs/llava-mistral-umed --benchmark demo_studies --data-root studies --out evaluation\n"
        "  umed evaluate runs/llava-mistral-umed --benchmark vqa_rad --data-root VQA-RAD --out rad --compare rad-before",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint, or a LoRA folder")
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        required=True,
        help=f"{', '.join(BENCHMARKS)}; mau or another recipe (name or YAML); records (JSON) that `umed recipe build` wrote; "
        f"LLaVA-Med's question file (.jsonl); or {', '.join(f'{kind}:RECIPE' for kind in OF_RECIPES)}",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        type=Path,
        help="folder of the benchmark's or recipe's files (none for a JSON of records, whose images lie beside it)",
    )
    parser.add_argument(
        "--as",
        dest="report_as",
        metavar="TREATMENT",
        help="with report:RECIPE, compare texts as R2Gen does: r2gen (IU X-ray), or r2gen:10,100 (MIMIC-CXR: words rarer than 10 "
        "are unknown, texts are cut to 100 tokens)",
    )
    parser.add_argument(
        "--scores",
        dest="report_scores",
        metavar="FILE.csv",
        type=Path,
        help="with report:RECIPE, a CSV with a column id and further scores of the answers, which are averaged with the others",
    )
    parser.add_argument("--split", help="train, val or test (default: test)")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="only the first N questions of each part of the benchmark"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write evaluation.json and predictions.jsonl here")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="answer only share I of N, for a scheduler that starts N processes; the last one to end writes evaluation.json",
    )
    parser.add_argument(
        "--compare",
        metavar="DIR",
        type=Path,
        help="the --out of another evaluation of the same questions: print paired differences",
    )
    parser.add_argument(
        "--template",
        help="prompt template (default: the checkpoint's stock one for named benchmarks, its umed one for recipes)",
    )
    parser.add_argument(
        "--boxes",
        metavar="DIALECT",
        default="llava",
        help="format in which the checkpoint writes boxes: llava, qwen_vl, qwen2_5_vl, internvl, kosmos, maira, paligemma, "
        "radvlm, shikra, coco, or order,unit,frame as in xywh,1000,image (default: llava)",
    )
    parser.add_argument(
        "--give-box",
        action="store_true",
        help="give the true boxes in the question, and judge the diagnosis alone: does the model fail to look, or to know?",
    )
    parser.add_argument(
        "--base", metavar="CKPT", type=Path, help="base checkpoint of a LoRA folder (default: as it says)"
    )
    add_similar_flags(parser, "default: the recipe or JSON of --benchmark")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add_dtype_flag(parser)
    parser.add_argument(
        "--server",
        metavar="URL",
        help="let a vLLM server write the answers, such as http://127.0.0.1:8000/v1; `umed rollout-server CKPT` starts one",
    )
    parser.add_argument(
        "--allow-remote", action="store_true", help="--server may be another machine, which gets the embedded images"
    )
    parser.add_argument(
        "--server-adapters",
        metavar="DIR",
        type=Path,
        help="write the adapter of a LoRA folder here, where the server of --server can read it (default: a temporary folder, "
        "which only a server of this user on this machine can read)",
    )
    parser.add_argument(
        "--server-max-difference",
        metavar="NATS",
        type=float,
        help="largest mean difference of the server's log-probabilities from those here, in nats a token; above it the server "
        f"holds another model (default: {ROLLOUT_MAX_DIFFERENCE:g})",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="questions at a time (default: 16)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, help="longest answer (default: the benchmark's; 128 for recipes)"
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        default="stop",
        help="stop at missing images, of recipes also at unreadable ones, or leave them out and count them",
    )
    parser.add_argument(
        "--pseudo-boxes",
        action="store_true",
        help="measure records against boxes of an anomaly map too, which no person drew (default: refuse them)",
    )
    parser.add_argument(
        "--image-cache", metavar="DIR", type=Path, help="keep decoded and resized images here for the next evaluation"
    )
    parser.add_argument(
        "--image-cache-gb", metavar="GB", type=float, default=20.0, help="maximum size of the cache (default: 20)"
    )
    add_quiet_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files."""
    from umed_plugin.evaluation.benchmarks.catalogue import benchmark_of
    from umed_plugin.evaluation.evaluator import check_benchmark, evaluate, evaluate_shard
    from umed_plugin.evaluation.tables import unread_boxes_line
    from umed_plugin.patches import prepare_llava

    dialect = _checked(args)
    server = _server_of(args)
    shard, ranks = _share_of(args)
    check_benchmark(args.benchmark)
    before = _before(args)
    prepare_llava()
    what = (args.checkpoint, args.benchmark, args.data_root)
    how = {"split": args.split, "limit": args.limit, "out": args.out, "dialect": dialect}
    how.update(similar=args.similar, similar_from=args.similar_from)
    how.update({name: getattr(args, name) for name in _SETTINGS}, server=server)
    if args.server_max_difference is not None:
        how.update(server_max_difference=args.server_max_difference)
    how.update(compare_with=before)
    how.update(report_as=args.report_as, report_scores=args.report_scores)
    with progress("answering", "question") as advance:
        if shard is None:
            evaluation: Evaluation | None = evaluate(*what, progress=advance, **how)
        else:
            first = shard.index == 1
            # Under a launcher rank 0 reports for all; a scheduler may start the shares at any time.
            evaluation = evaluate_shard(*what, shard=shard, wait=ranks and first, progress=advance, **how)
            if ranks and not first:
                return 0
    if evaluation is None:
        note(f"shard {shard} is answered. Whoever answers the last one writes {args.out / 'evaluation.json'}.")
        return 0
    _show(args, evaluation, before)
    if benchmark_of(evaluation.benchmark).reads_boxes:
        line = unread_boxes_line([prediction.answer for prediction in evaluation.predictions], dialect)
        if line is not None:
            warn(line)
    return 0


def _checked(args: argparse.Namespace) -> BoxDialect:
    """Refuse what is wrong with the flags alone, before LLaVA is imported and a checkpoint is read.

    Returns:
        the dialect of ``--boxes``.
    """
    from umed_plugin.checkpoints.folder import check_base
    from umed_plugin.checkpoints.precision import answering_device
    from umed_plugin.checkpoints.prompt_templates import check_template
    from umed_plugin.evaluation.benchmarks.report import PREFIX as REPORTS
    from umed_plugin.grounding.dialects import find_dialect

    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; needed: 1 or more.")
    if not 0 < args.image_cache_gb < math.inf:
        raise UsageError(f"--image-cache-gb is {args.image_cache_gb:g}; needed: a number of GB above 0.")
    if args.compare is not None and args.out is not None and args.compare.resolve() == args.out.resolve():
        raise UsageError(
            f"--compare {args.compare} is the folder of --out: an evaluation would be compared with itself. Give the --out of "
            "another evaluation."
        )
    check_base(args.base, args.checkpoint)
    check_similar_flags(args)
    for name, value in (("--as", args.report_as), ("--scores", args.report_scores)):
        if value is not None and not args.benchmark.startswith(REPORTS):
            raise UsageError(f"{name} has no effect without --benchmark {REPORTS}RECIPE.")
    check_template(args.template)
    dialect = find_dialect(args.boxes)
    if args.device == "cuda":
        answering_device(args.device)
    return dialect


def _server_of(args: argparse.Namespace) -> RolloutServer | None:
    """The server of ``--server``."""
    from umed_plugin.checkpoints.folder import is_lora
    from umed_plugin.remote.rollout_server import RolloutServer
    from umed_plugin.remote.settings import rollout_server_faults

    most = args.server_max_difference
    if args.server is None:
        given = (
            ("--allow-remote", args.allow_remote),
            ("--server-adapters", args.server_adapters),
            ("--server-max-difference", most is not None),
        )
        for flag, value in given:
            if value:
                raise UsageError(f"{flag} has no effect without --server.")
        return None
    if args.server_adapters is not None and args.checkpoint.is_dir() and not is_lora(args.checkpoint):
        raise UsageError(
            f"--server-adapters {args.server_adapters} has no effect: {args.checkpoint} holds no adapter. Remove it."
        )
    if most is not None and not 0 < most < math.inf:
        raise UsageError(f"--server-max-difference is {most:g}; needed: a number of nats above 0.")
    for fault in rollout_server_faults("--server", args.server, "--allow-remote", args.allow_remote):
        raise UsageError(fault)
    return RolloutServer(args.server.rstrip("/"), timeout_flag=None, adapters_flag="--server-adapters")


def _share_of(args: argparse.Namespace) -> tuple[Shard | None, bool]:
    """The share of this process, None for all questions; and whether a launcher gave it, which starts all shares at once."""
    from umed_plugin.data.shards import parse_shard, shard_of_process

    of_rank = shard_of_process()
    shard = of_rank if args.shard is None else parse_shard(args.shard)
    if shard is not None and args.out is None:
        raise UsageError(f"shard {shard} needs --out: a folder that all processes see, where their answers are joined.")
    if of_rank is not None and args.shard is not None:
        raise UsageError(
            f"--shard {args.shard}: a launcher has already given this process shard {of_rank}. Remove one of the two."
        )
    if of_rank is not None:
        _take_own_gpu(args.device)
    return shard, of_rank is not None


def _take_own_gpu(device: str | None) -> None:
    """Make "cuda" this rank's own GPU."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _before(args: argparse.Namespace) -> Evaluation | None:
    """The evaluation to compare with, read before hours are spent on answers."""
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS, split_name
    from umed_plugin.evaluation.benchmarks.llava_med import is_question_file
    from umed_plugin.evaluation.benchmarks.recipe import GIVEN_BOX
    from umed_plugin.evaluation.pairing import may_be_compared
    from umed_plugin.evaluation.results import Evaluation

    if args.compare is None:
        return None
    before = Evaluation.load(args.compare)
    of_recipe, _ = split_name(args.benchmark)
    if of_recipe is not None:
        asked = of_recipe.benchmark.name
    elif args.benchmark in BENCHMARKS:
        asked = args.benchmark
    elif is_question_file(args.benchmark):
        asked = "llava_med"
    else:
        asked = GIVEN_BOX.name if args.give_box else "recipe"
    if not may_be_compared(before.benchmark, asked):
        raise UmedError(f"{args.compare}: holds an evaluation of {before.benchmark}, not of {asked}.")
    return before


def _show(args: argparse.Namespace, evaluation: Evaluation, before: Evaluation | None) -> None:
    from umed_plugin.data.similar import WITHOUT_SIMILAR
    from umed_plugin.evaluation.constants import constant_notes
    from umed_plugin.evaluation.results import compare
    from umed_plugin.evaluation.tables import direction_note, from_fewer, interval_notes, metrics_table, sources_table

    console, differences, refused = make_console(wide_in_pipes=True), None, None
    try:
        differences = None if before is None else compare(before, evaluation)
    except UmedError as error:
        refused = error  # told below the table, which took hours
    if "accuracy_average" in evaluation.metrics:
        console.print(sources_table(args.checkpoint.name, evaluation.metrics))
    title, other = (one_line(path.name) for path in (args.checkpoint, args.compare or args.checkpoint))
    console.print(metrics_table(title, evaluation.metrics, differences, other, evaluation.constants))
    notes = [f"95 % intervals, resampled by {evaluation.unit}.", *interval_notes(evaluation.metrics, evaluation.unit)]
    notes += constant_notes(evaluation.metrics, evaluation.constants)
    notes += [f"{args.similar} similar cases before each question. {WITHOUT_SIMILAR}"] if args.similar else []
    if differences is not None:
        notes += [
            *interval_notes(from_fewer(differences, evaluation.metrics), evaluation.unit),
            direction_note(differences),
        ]
    if differences is not None and before is not None and before.benchmark != evaluation.benchmark:
        notes.append(
            "Differences are over the studies that both were asked; one of the two was given their true boxes."
        )
    for line in notes:
        console.print(line, style="dim", soft_wrap=True, markup=False)
    if evaluation.skipped:
        console.print(f"{evaluation.skipped} questions were left out: their images are missing or cannot be read.")
    if args.out:
        if differences is not None:
            comparison = {"before": str(args.compare), "after": str(args.out), "differences": differences}
            files.write_json(args.out / "comparison.json", comparison)
        else:
            (args.out / "comparison.json").unlink(missing_ok=True)  # of an earlier scoring of this folder
        console.print(f"written: {args.out / 'evaluation.json'}, {args.out / 'predictions.jsonl'}", soft_wrap=True)
    if refused is not None:
        raise refused
