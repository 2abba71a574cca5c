"""``umed evaluate``: figures of a checkpoint with confidence intervals, as a table and as JSON."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.errors import UmedError, UsageError, unknown_name


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="figures of a checkpoint on a benchmark, with confidence intervals",
        description="Ask a LLaVA checkpoint the questions of a benchmark, greedily, score the answers: each figure with n and "
        "its 95 % bootstrap interval. The records of a recipe (or 'mau') are scored by diagnosis, boxes and attention; named "
        "benchmarks by their own metrics. With --out, a run that was killed goes on where it stopped.",
        epilog="examples:\n"
        "  umed evaluate runs/llava-mistral-umed --benchmark demo_studies --data-root studies --out evaluation\n"
        "  umed evaluate runs/llava-mistral-umed --benchmark vqa_rad --data-root VQA-RAD --out rad --compare rad-before",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full checkpoint, or a LoRA folder")
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        required=True,
        help="vqa_rad, slake, pmc_vqa, medmnist, omnimedvqa, medvh, med_grit; mau or another recipe (name or YAML); or records "
        "(JSON) that `umed recipe build` wrote",
    )
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder of the benchmark's or recipe's files")
    parser.add_argument("--split", help="train, val or test (default: test)")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="only the first N questions of each part of the benchmark"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write evaluation.json and predictions.jsonl here")
    parser.add_argument(
        "--compare",
        metavar="DIR",
        type=Path,
        help="--out of another evaluation of the same questions: print differences",
    )
    parser.add_argument(
        "--template",
        help="of the prompt (default: the checkpoint's stock one for named benchmarks, its umed one for recipes)",
    )
    parser.add_argument(
        "--boxes",
        metavar="DIALECT",
        default="llava",
        help="how the checkpoint writes boxes: llava, qwen_vl, qwen2_5_vl, internvl, kosmos, maira, paligemma, radvlm, shikra, "
        "coco, or order,unit,frame as in xywh,1000,image (default: llava)",
    )
    parser.add_argument("--base", metavar="CKPT", type=Path, help="of a LoRA folder (default: as the adapter says)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda (float16) where there is one")
    parser.add_argument("--batch-size", metavar="N", type=int, default=16, help="questions at a time (default: 16)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, help="longest answer (default: the benchmark's; 128 for recipes)"
    )
    parser.add_argument(
        "--on-bad-image", choices=("stop", "skip"), default="stop", help="stop at missing images, or leave them out"
    )
    parser.add_argument(
        "--image-cache", metavar="DIR", type=Path, help="keep images decoded and resized here, for the next evaluation"
    )
    parser.add_argument(
        "--image-cache-gb", metavar="GB", type=float, default=20.0, help="most that it may hold (default: 20)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files."""
    from umed_plugin.evaluation.benchmarks.catalogue import BENCHMARKS
    from umed_plugin.patches import prepare_llava

    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; needed: 1 or more.")
    prepare_llava()
    with tempfile.TemporaryDirectory(prefix="umed-evaluate-") as folder:
        if args.benchmark in BENCHMARKS:
            return _run_benchmark(args, BENCHMARKS[args.benchmark], Path(args.out or folder))
        _check_name(args.benchmark, BENCHMARKS)
        return _run_records(args, Path(args.out or folder))


def _check_name(name: str, benchmarks: Iterable[str]) -> None:
    """Refuse a name that is no recipe's and no file's before the checkpoint is looked at."""
    from umed_plugin.data.recipes.recipe import shipped_recipes

    is_file = Path(name).is_file() or Path(name).suffix in (".json", ".yaml", ".yml")
    if not is_file and name not in shipped_recipes():
        known = {*benchmarks, *shipped_recipes()}
        raise UsageError(unknown_name("benchmark", name, known) + " Or a recipe's YAML, or a JSON of records.")


def _run_benchmark(args: argparse.Namespace, benchmark: Any, folder: Path) -> int:
    from umed_plugin.evaluation.runs import chosen_questions, compare_runs, evaluate_benchmark, read_run
    from umed_plugin.grounding.dialects import find_dialect

    if args.data_root is None:
        raise UsageError(f"--benchmark {benchmark.name} needs --data-root: {benchmark.needs}, from {benchmark.url}")
    dialect = find_dialect(args.boxes)
    before = _read(args.compare, read_run) if args.compare else None
    if before is not None and before[0] != benchmark.name:
        raise UmedError(f"{args.compare}: holds an evaluation of {before[0]}, not of {benchmark.name}.")
    skip = args.on_bad_image == "skip"
    questions, skipped = chosen_questions(
        benchmark, args.data_root, split=args.split, limit=args.limit, work=folder / "data", skip=skip
    )
    with _Bar(len(questions)) as advance:
        found = evaluate_benchmark(
            args.checkpoint,
            benchmark,
            questions,
            out=args.out,
            base=args.base,
            template=args.template,
            dialect=dialect,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            device=args.device,
            image_cache=args.image_cache,
            image_cache_gb=args.image_cache_gb,
            skipped=skipped,
            candidates=benchmark.candidates(args.data_root) if benchmark.candidates else (),
            progress=advance,
        )
    differences = None if before is None else compare_runs(benchmark, before[1], found.rows)
    _show(args, found.figures, differences, skipped)
    return 0


def _run_records(args: argparse.Namespace, folder: Path) -> int:
    from umed_plugin.evaluation.grounded import Evaluation, compare, evaluate
    from umed_plugin.grounding.dialects import find_dialect

    dialect = find_dialect(args.boxes)
    before = _read(args.compare, Evaluation.load) if args.compare else None
    records, image_folder = _records(args, folder)
    with _Bar(len(records)) as advance:
        found = evaluate(
            args.checkpoint,
            records,
            image_folder=image_folder,
            template=args.template,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens or 128,
            base=args.base,
            device=args.device,
            image_cache=args.image_cache,
            image_cache_gb=args.image_cache_gb,
            dialect=dialect,
            folder=args.out,
            progress=advance,
        )
    differences = None if before is None else compare(before, found)["figures"]
    if args.out:
        found.save(args.out)
        _save_for_llava_med(found, records, args.out)
    _show(args, found.metrics["figures"], differences, 0)
    return 0


def _save_for_llava_med(found: Any, records: Sequence[Any], out: Path) -> None:
    from umed_plugin.evaluation.benchmarks.benchmark import Question
    from umed_plugin.evaluation.benchmarks.llava_med_files import save_for_llava_med
    from umed_plugin.model.answerer import ModelAnswer

    truth = {str(record["id"]): record["conversations"][1]["value"] for record in records}
    questions = [Question(case.id, case.image, case.question, truth[case.id]) for case in found.cases]
    answers = {case.id: ModelAnswer(case.answer, []) for case in found.cases}
    save_for_llava_med(found.checkpoint, "mau", questions, answers, (), out / "llava_med")


def _read(folder: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UmedError(f"{folder}: its files are not those of an evaluation ({error!r}).") from error


class _Bar:
    """A progress bar over questions; what it gives is called with (done, in all)."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("answering", total=total)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, _total: self._bar.update(self._task, completed=done)

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()


def _show(args: argparse.Namespace, figures: Any, differences: Any, skipped: int) -> None:
    from rich.console import Console

    from umed_plugin.evaluation.tables import figures_table, sources_table

    console = Console()
    if "accuracy_average" in figures:
        console.print(sources_table(args.checkpoint.name, figures))
    console.print(figures_table(args.checkpoint.name, figures, differences))
    if skipped:
        console.print(f"{skipped} questions were left out: their images are missing.")
    if args.out:
        if differences is not None:
            told = {"before": str(args.compare), "after": str(args.out), "differences": differences}
            files.write_json(args.out / "comparison.json", told)
        console.print(f"written: {args.out / 'evaluation.json'}, {args.out / 'predictions.jsonl'}")


def _records(args: argparse.Namespace, folder: Path) -> tuple[list[Any], Path]:
    """(records of the split, folder that their relative image paths start from)."""
    from umed_plugin.checkpoints.loading import find_base, is_lora, read_config
    from umed_plugin.data.records import load_records

    split = args.split or "test"
    if args.benchmark.endswith(".json"):
        records, image_folder = load_records(args.benchmark), Path(args.benchmark).resolve().parent
    else:
        from umed_plugin.data.build import build_records
        from umed_plugin.data.recipes.recipe import load_recipe

        checkpoint = find_base(args.checkpoint, args.base) if is_lora(args.checkpoint) else args.checkpoint
        mode = "pad" if read_config(checkpoint).get("image_aspect_ratio") == "pad" else "square"
        image_folder = folder / "data"
        records = build_records(
            load_recipe(args.benchmark),
            out_dir=image_folder,
            image_aspect_ratio=mode,
            split=split,
            data_root=args.data_root,
            on_bad_image=args.on_bad_image,
            # What is rendered into a folder of its own each time would never be found again.
            render=args.image_cache is None,
        )
    records = [record for record in records if record["split"] == split]
    return records[: args.limit] if args.limit else records, image_folder
