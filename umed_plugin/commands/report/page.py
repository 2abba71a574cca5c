"""Writes the report: table, curves and galleries into one HTML file.

The file loads nothing: its Content-Security-Policy forbids that and allows only its own script, identified by hash. Texts of
models and names of files are escaped in the template and set as text by the script, so that they cannot become markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umed_plugin import files
from umed_plugin.commands.page_parts import GALLERY_SCRIPTS, GALLERY_STYLES, render_page
from umed_plugin.commands.report.about import about_run, about_training, decision_words, other_settings
from umed_plugin.commands.report.curves import GRPO_LOSS, charts_of, rewards_note
from umed_plugin.commands.report.gallery import candidate_cards, looked_over_uniform, study_cards
from umed_plugin.commands.report.run_folder import Run, Training, read_run, stage_label
from umed_plugin.commands.report.table import metrics_table
from umed_plugin.evaluation.benchmarks.recipe_cases import cases_of
from umed_plugin.files.locks import locked

FILE = "report.html"
STUDIES = 500


def write_report(
    run_dir: Path | str, most_studies: int = STUDIES, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """Write ``run_dir/report.html`` and return its path; the file appears complete or not at all.

    Args:
        run_dir: folder of `umed demo`, `umed upgrade` or one training.
        most_studies: in the gallery; the table covers all studies.
        progress: called with (what is being done, done, in all).

    Raises:
        UmedError: the folder holds nothing to report, or a damaged file.
    """
    run = read_run(run_dir)
    file = run.folder / FILE
    with locked(file, busy="another report of this run is being written", flag="RUN_DIR"):
        files.write_text(file, render(run, most_studies, progress))
    return file


def render(run: Run, most_studies: int, progress: Callable[[str, int, int], None] | None = None) -> str:
    """The HTML of a run's report."""
    from umed_plugin import __version__

    def advance(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    shelf = Path(__file__).parent
    labels = [stage_label(stage) for stage in run.evaluations]
    studies = study_cards(run.evaluations, most_studies, run.folder, advance("drawing studies"))
    candidates = candidate_cards(run.candidates, run.folder, advance("drawing sampled answers"))
    looked, not_shown = looked_over_uniform(run.evaluations, studies)
    table, notes = metrics_table(run.evaluations, looked)
    notes += [not_shown] if not_shown else []
    asked = max((len(cases_of(evaluation)) for evaluation in run.evaluations.values()), default=0)
    if len(studies) < asked:
        notes.append(
            f"The gallery shows {len(studies)} of the {asked} studies: a third with the largest gains, a third with the worst "
            "last answers, and others evenly spaced. The table covers all of them."
        )
    trainings = [_training(training, advance("drawing curves")) for training in run.trainings]
    charts = [chart.plot for training in trainings for group in training["groups"].values() for chart in group]
    return render_page(
        shelf / "report.html",
        styles=[*GALLERY_STYLES, shelf / "report.css"],
        scripts=[*GALLERY_SCRIPTS, shelf / "report.js"],
        data={
            **_finite({"stages": labels, "studies": studies, "candidates": candidates, "charts": charts}),
            "norm": next(
                (one.settings.get("umed_reward_norm") for one in run.trainings if one.stage == "rewarding"), None
            ),
            "metrics": _finite(table["exact"], None) if table else None,
            "name": run.folder.name,
        },
        name=run.folder.name,
        about=about_run(run),
        decision=decision_words(run),
        version=__version__,
        notes=notes,
        table=table,
        trainings=trainings,
        warnings=[warning for training in trainings for warning in training["warnings"]],
        chance=looked.warning() if looked else "",
        stages=labels,
        studies=len(studies),
        candidates=len(candidates),
    )


def _training(training: Training, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    kinds = {"instruction_tuning": "Stage 1, instruction tuning", "rewarding": "Stage 2, rewarding", None: "Training"}
    steps = f"{training.steps} steps"
    if training.steps < training.of_steps:
        steps = f"{training.steps} of {training.of_steps} steps: not finished"
    drawn = charts_of(training)
    groups = {title: [chart for chart in charts if not chart.is_zero] for title, charts in drawn.items()}
    if progress is not None:
        progress(1, 1)
    warned = "in the trial of stage 2, " if training.trial else ""
    about = f"{steps}." if drawn else f"{steps}; nothing was logged (see --logging_steps)."
    is_grpo = training.stage == "rewarding" and training.settings.get("umed_algorithm", "grpo") == "grpo"
    return {
        "title": f"{'Trial of stage 2' if training.trial else kinds[training.stage]}: {training.name}",
        "about": about,
        "groups": groups,
        "zero": {title: [chart.name for chart in charts if chart.is_zero] for title, charts in drawn.items()},
        "alarms": {title: sum(bool(chart.alarm) for chart in charts) for title, charts in groups.items()},
        "warnings": [
            f"{warned}{chart.name}: {chart.alarm}." for charts in groups.values() for chart in charts if chart.alarm
        ],
        "notes": {
            **({"Loss": GRPO_LOSS} if is_grpo else {}),
            **({"Rewards": rewards_note(training.settings)} if training.stage == "rewarding" else {}),
        },
        "facts": about_training(training),
        "settings": other_settings(training),
    }


def _finite(value: Any, digits: int | None = 5) -> Any:
    """Numbers with 5 decimals, or all digits; None for those that JSON cannot hold."""
    if isinstance(value, float):
        return (value if digits is None else round(value, digits)) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, digits) for item in value]
    return value
