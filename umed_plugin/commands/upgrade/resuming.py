"""What a continued upgrade keeps from its earlier start, and where it goes on.

How to run: ``what_is_kept(upgrade.steps, upgrade.provenance, upgrade.is_left)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.provenance import Provenance
from umed_plugin.flags.rules import STAGES
from umed_plugin.training.run_settings import last_checkpoint


def what_is_kept(steps: Sequence[Step], provenance: Provenance, is_left: Callable[[Step], bool]) -> str | None:
    """One sentence on the steps that are done, and one on the step that is next; None for a first start, and without a next step.

    Args:
        steps: of the run, in their order.
        provenance: of the run.
        is_left: whether a step has to run.
    """
    following = next((step for step in steps if is_left(step)), None)
    kept = [step for step in steps if provenance.is_done(step)]
    begun = following is not None and provenance.read(following) is not None
    if following is None or not (kept or begun):
        return None
    place = f"Goes on with {following.title}"
    if begun and following.trains:
        checkpoint = last_checkpoint(following.outputs[0])
        place += f", from its {checkpoint.name}" if checkpoint else ", from its beginning: it has no checkpoint yet"
    elif begun:
        place += ", which had begun" + (": what is answered is not asked again" if following.resumable else "")
    titles = ", ".join(step.title for step in kept) or "nothing"
    return f"kept from the earlier start: {titles} ({len(kept)} of {len(steps)} steps). {place}."


def stages_going_on(steps: Sequence[Step], provenance: Provenance) -> set[str]:
    """Stages that begin no training: it has ended, has a checkpoint to go on from, or is not in the plan.

    A training whose settings have changed begins anew, and so does each one behind a training that begins.
    """
    beginning: set[str] = set()
    begins = False
    for step in steps:
        if step.trains:
            ended = (provenance.read(step) or {}).get("outputs") is not None
            has_begun = ended or last_checkpoint(step.outputs[0]) is not None
            begins = begins or not has_begun or bool(provenance.differences(step, inputs=False))
            beginning |= {name for name in STAGES if begins and _trains_stage(step, name)}
    return {*STAGES} - beginning


def _trains_stage(step: Step, name: str) -> bool:
    return step.trains and step.name.startswith("stage_") and step.name.endswith(name)
