"""What probes in the training data bring: stage 1 with ``probes: {share: 0.1}`` beside stage 1 without, on the demo's studies.

Both start from the same base and see the same studies; one also sees probes of these studies. Both are then asked the probes of
the held-out studies, and their diagnoses with boxes. Questions and intervals are those of ``umed evaluate``.

    python benchmarks/probing.py runs/probing --seeds 0,1,2

Finished steps are not done again. Writes ``results.json`` to the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from umed_plugin.commands.demo.pipeline import DemoRun, DemoSettings
from umed_plugin.data.probes import probe_records
from umed_plugin.data.records import load_records, save_records
from umed_plugin.evaluation.benchmarks.probes import OF_RECIPE, probe_questions
from umed_plugin.evaluation.benchmarks.recipe import RECIPE, record_questions
from umed_plugin.evaluation.evaluation_run import EvaluationSettings
from umed_plugin.evaluation.evaluator import evaluate_questions
from umed_plugin.evaluation.questions import chosen_questions
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.tables import formatted
from umed_plugin.terminal.progress import Steps

WITHOUT, WITH = "without", "with"
SHOWN = {
    "probes": ("balanced_accuracy", "balanced_accuracy/wrong_image", "balanced_accuracy/removed_option")
    + ("balanced_accuracy/false_premise", "balanced_accuracy/suggestion", "takes_suggestion/wrong"),
    "studies": ("accuracy", "mean_iou"),
}


class SeedRun:
    """One seed: studies, base, both trainings, and their evaluations."""

    def __init__(self, folder: Path, seed: int, settings: DemoSettings, share: float, limit: int) -> None:
        from rich.console import Console

        self.demo = DemoRun(folder, seed, settings, Steps(Console(quiet=True)))
        self.share, self.limit = share, limit

    def train(self) -> None:
        """Both trainings."""
        demo, done = self.demo, lambda name: (self.demo.checkpoint(name) / "config.json").is_file()
        if not demo.tuning_records.is_file():
            demo.records()
        if not done("base"):
            demo.base_checkpoint()
        if not done(WITHOUT):
            demo.instruction_tuning(WITHOUT)
        if not done(WITH):
            plain = load_records(demo.tuning_records)
            mixed = demo.data / "with_probes.json"
            save_records([*plain, *probe_records(plain, self.share, demo.seed)[0]], mixed)
            demo.instruction_tuning(WITH, flags=["--data_path", mixed])

    def evaluations(self, name: str) -> dict[str, Evaluation]:
        """Probes and studies of the held-out split, asked of one checkpoint."""
        studies = record_questions(load_records(self.demo.data / "records.json", split="test"), self.demo.data)
        asked = replace(OF_RECIPE.benchmark, questions=lambda *_: probe_questions(studies))
        probes, _ = chosen_questions(asked, None, limit=self.limit, work=self.demo.data)
        settings = EvaluationSettings(batch_size=50, max_new_tokens=24, device="cpu")
        out = self.demo.out / "evaluation" / name
        checkpoint = self.demo.checkpoint(name)
        probed = evaluate_questions(checkpoint, OF_RECIPE.benchmark, probes, settings, out=out / "probes")
        settings = replace(settings, max_new_tokens=self.demo.settings.max_new_tokens)
        return {
            "probes": probed,
            "studies": evaluate_questions(checkpoint, RECIPE, studies, settings, out=out / "studies"),
        }


def rows(found: dict[str, dict[str, Evaluation]]) -> list[dict[str, Any]]:
    """Each shown metric: without, with, and the paired difference with its interval."""
    listed = []
    for what, names in SHOWN.items():
        before, after = found[WITHOUT][what], found[WITH][what]
        differences = compare(before, after)
        for name in names:
            best = before.constants.get(name, {}).get("value")
            listed.append(
                {
                    "metric": name,
                    WITHOUT: before.metrics[name]["value"],
                    WITH: after.metrics[name]["value"],
                    "difference": differences[name]["difference"],
                    "ci95": differences[name]["ci95"],
                    "without_looking": best,
                    "n": differences[name]["n"],
                }
            )
    return listed


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the table of each seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0", help="separated by commas (default: 0)")
    parser.add_argument("--share", type=float, default=0.1, help="of probes (default: 0.1)")
    parser.add_argument("--studies", type=int, default=2000, help="of the training split (default: 2000)")
    parser.add_argument("--test", type=int, default=200, help="held-out studies (default: 200)")
    parser.add_argument("--epochs", type=float, default=5, help="of stage 1 (default: 5)")
    parser.add_argument("--limit", type=int, default=200, help="questions of each kind of probe (default: 200)")
    parser.add_argument("--processes", type=int, default=2, help="that train side by side (default: 2)")
    args = parser.parse_args(arguments)
    from umed_plugin.patches import prepare_llava

    prepare_llava()
    settings = DemoSettings(
        tuning=args.studies,
        rewarding=0,
        val=0,
        test=args.test,
        tuning_epochs=args.epochs,
        processes=args.processes,
    )
    results = {}
    for seed in args.seeds.split(","):
        run = SeedRun(args.out.resolve() / f"seed{seed}", int(seed), settings, args.share, args.limit)
        run.train()
        results[seed] = rows({name: run.evaluations(name) for name in (WITHOUT, WITH)})
        print(f"seed {seed}, share {args.share:g}\n\n| metric | without | with | difference | without looking | n |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for row in results[seed]:
            best = "" if row["without_looking"] is None else f"{row['without_looking']:.3f}"
            moved = formatted(row["difference"], row["ci95"], "+.3f")
            print(f"| {row['metric']} | {row[WITHOUT]:.3f} | {row[WITH]:.3f} | {moved} | {best} | {row['n']} |")
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
