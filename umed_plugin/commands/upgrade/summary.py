"""What a run of an upgrade comes to: ``summary.json``, the manifest in the result's folder, and what is printed of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umed_plugin.commands.upgrade.checkpoint_swap import CheckpointSwap
from umed_plugin.commands.upgrade.decision import Decision, decide, longer_stage_1, unused_labels
from umed_plugin.commands.upgrade.plan import Plan, Step
from umed_plugin.commands.upgrade.provenance import MANIFEST, Provenance, read_json, versions
from umed_plugin.commands.upgrade.settings import RUN_FILE
from umed_plugin.files import write_json
from umed_plugin.terminal.text import one_line

SUMMARY, REPORT = "summary.json", "report.html"


def decision_of(plan: Plan) -> Decision:
    """What the trial of ``rewarding: auto`` says, once it is evaluated. Kept, because a trial may be removed to save space.

    What an earlier version has decided by the same trial stands.
    """
    from umed_plugin.evaluation.results import Evaluation

    training, _, before, after = plan.trial()
    state, kept = training.outputs[0] / "trainer_state.json", plan.folder / "trial" / "decision.json"
    written = read_json(kept) if kept.is_file() else None
    start_if_unsure = plan.settings.rewarding.when_unsure == "start"
    if written is not None and not state.is_file():
        decision = Decision.of_json(written, start_if_unsure)
    else:
        log = read_json(state)["log_history"]
        evaluations = Evaluation.load(before.outputs[0]), Evaluation.load(after.outputs[0])
        decision = decide(log, *evaluations, start_if_unsure=start_if_unsure)
        if written is not None and decision.was_decided_in(written):
            decision = Decision.of_json(written)
        else:
            write_json(kept, decision.as_json())
    decision = decision.with_reason(longer_stage_1(plan.longer_stage_1()))
    if not decision.starts and plan.settings.label_share is not None:
        decision = decision.with_reason(unused_labels(plan.settings.label_share))
    return decision


def summarise(plan: Plan, decision: Decision | None) -> dict[str, Any]:
    """Write ``summary.json``, and return its content.

    Args:
        plan: whose evaluations are there.
        decision: of ``rewarding: auto``, if it was asked for.
    """
    from umed_plugin.evaluation.benchmarks.recipe_cases import headline
    from umed_plugin.evaluation.results import Evaluation, compare

    evaluations = {stage: Evaluation.load(plan.folder / "evaluation" / stage) for stage in plan.evaluated}
    base, *_, before, last = [evaluations["base"], *evaluations.values()]
    summary = {
        **{stage: headline(evaluation) for stage, evaluation in evaluations.items()},
        "comparison": compare(before, last),
        "comparison_with_base": compare(base, last),
        "seed": plan.settings.seed,
        **({"rewarding_auto": decision.as_json()} if decision is not None else {}),
    }
    write_json(plan.folder / SUMMARY, summary)
    return summary


def write_manifest(summary: dict[str, Any], plan: Plan, steps: Sequence[Step], provenance: Provenance) -> None:
    """Write into the result's folder what it was made from."""
    origins = dict.fromkeys((plan.origin.checkpoint, plan.origin.full))
    recipe = {key: value for step in steps for key, value in step.digests.items()}
    content = {
        "made_by": "umed upgrade",
        "input": {str(path): provenance.hashes(path) for path in origins},
        "recipe": {"name": plan.settings.recipe, "sha256": recipe},
        "records": {str(plan.records): provenance.hash_of(plan.records)},
        "seed": plan.settings.seed,
        "versions": versions(),
        "settings": plan.settings.model_dump(),
        "commands": [step.line() for step in steps],
        "evaluation": {stage: summary[stage] for stage in plan.evaluated},
        "files": provenance.hashes(plan.result),
    }
    write_json(plan.result / MANIFEST, content)


def print_summary(summary: dict[str, Any], plan: Plan, swap: CheckpointSwap, console: Any) -> None:
    """Print the metrics of the stages, and where the files are."""
    from umed_plugin.evaluation.stages_table import stages_notes, stages_table

    stages = {stage: summary[stage] for stage in plan.evaluated}
    console.print(stages_table(stages, summary["comparison"]))
    for line in stages_notes(stages, summary["comparison"]):
        console.print(line, style="dim", soft_wrap=True)
    if "rewarding_auto" in summary:
        decided = summary["rewarding_auto"]
        words = one_line(f"rewarding: auto: stage 2 was {decided['stage_2']}: {' '.join(decided['because'])}")
        console.print(words, soft_wrap=True, markup=False)
    in_place = plan.settings.in_place
    checkpoint = swap.checkpoint if in_place else plan.result
    paths = {"checkpoint": checkpoint, "report": plan.folder / REPORT, "settings": plan.folder / RUN_FILE}
    for name, path in paths.items():
        console.print(f"{name}: {one_line(path)}", soft_wrap=True)
    if in_place and swap.backup.exists():
        console.print(f"old checkpoint: {one_line(swap.backup)}", soft_wrap=True)
