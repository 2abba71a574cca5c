"""``--benchmark probes:RECIPE``: does an answer change when the picture does? Probes with controls, after MedVH.

The questions are those of `umed_plugin.data.probes`, made from the records of a recipe's split. A probe and its control have the
same words, so an answer that does not depend on the image is right for one of them at most: **a balanced accuracy of 0.5 is what
nobody needs to look for**. An answer counts as the option whose letter it states, else as the only option that it contains, else
as the option with the highest difflib ratio; one that contains several is wrong.

How to run: ``umed evaluate CKPT --benchmark probes:RECIPE --data-root DIR``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from umed_plugin.checkpoints.folder import UMED_TEMPLATES
from umed_plugin.data.probes import KINDS, SUGGESTION, Probe, make_probes
from umed_plugin.errors import UmedError, warn
from umed_plugin.evaluation.benchmarks.benchmark import Benchmark, BenchmarkQuestion, OfRecipe, no_questions
from umed_plugin.evaluation.metrics.answers import in_tags, words
from umed_plugin.evaluation.metrics.choices import nearest_option, stated_letters
from umed_plugin.evaluation.metrics.llava_med import holds
from umed_plugin.evaluation.metrics.metric import RATE, Metric, Row, mean_of_groups, means
from umed_plugin.grounding.scoring import Scorer
from umed_plugin.model.answerer import ModelAnswer


def probe_questions(studies: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """The probes of a recipe's studies, each followed by its control; says which kinds there are none of.

    Raises:
        UmedError: no kind can be made of these studies.
    """
    of_record = {str(study.about["record"]["id"]): study for study in studies}
    found = make_probes([study.about["record"] for study in studies])
    if not found.by_kind:
        raise UmedError("these studies allow no probe:\n  " + "\n  ".join(found.told()))
    for line in found.told():
        warn(line)
    return [
        _question(probe, of_record[str(probe.shown["id"])]) for probes in found.by_kind.values() for probe in probes
    ]


def _question(probe: Probe, study: BenchmarkQuestion) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        id=f"{probe.kind}/{probe.pair}/{probe.role}",
        image=study.image,
        text=probe.text,
        truth=probe.options[probe.right],
        groups={"part": probe.kind, "role": probe.role, "cell": f"{probe.kind}/{probe.role}", **study.groups},
        about={
            "choices": list(probe.options),
            "right": probe.right,
            "escape": probe.escape,
            "suggested": probe.suggested,
            "shown": study.id,
        },
        patient=study.patient,
        part_of=study.part_of,
        reading=study.reading,
    )


def stated_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer stands for; None if it stands for none, or for several."""
    letters = stated_letters(answer, options)
    if letters:
        return letters[0] if len(letters) == 1 else None
    said = words(in_tags(answer))
    held = [index for index, option in enumerate(options) if holds(said, words(option))]
    # "nodule" is held by "there is no nodule" as well: the longer option is meant.
    held = [i for i in held if not any(j != i and holds(words(options[j]), words(options[i])) for j in held)]
    if len(held) > 1:
        return None
    return held[0] if held else nearest_option(in_tags(answer), options)


def score(question: BenchmarkQuestion, answer: ModelAnswer, scorer: Scorer) -> dict[str, float]:
    """Right or wrong; whether it refuses the question, or takes the suggestion, where it could."""
    about = question.about
    chosen = stated_option(answer.text, about["choices"])
    values = {"accuracy": float(chosen == about["right"])}
    for name, of in (("escapes", "escape"), ("takes_suggestion", "suggested")):
        if about[of] is not None:
            values[name] = float(chosen == about[of])
    return values


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Balanced accuracy over all kinds and of each; accuracy of probes and controls; refusals; suggestions taken.

    ``balanced_accuracy/<kind>`` is the mean of the accuracy of its probes and that of its controls.
    ``balanced_accuracy`` is the mean over the kinds.
    """
    (accuracy,) = means("accuracy")
    (escapes,) = means("escapes")
    (takes,) = means("takes_suggestion")
    kinds = [kind for kind in KINDS if any(row.groups["part"] == kind for row in rows)]
    reported = [Metric("balanced_accuracy", mean_of_groups("accuracy", "cell"), ("accuracy", "cell"))]
    for kind in kinds:
        of_kind = {"part": kind}
        reported.append(
            Metric(f"balanced_accuracy/{kind}", mean_of_groups("accuracy", "role"), ("accuracy", "role"), of_kind)
        )
        for role in ("probe", "control"):
            reported.append(
                replace(accuracy, name=f"accuracy/{kind}/{role}", where={**of_kind, "role": role}, limits=RATE)
            )
        if kind != SUGGESTION:
            reported.append(replace(escapes, name=f"escapes/{kind}", where=of_kind, rates=False))
    if SUGGESTION in kinds:
        wrong = replace(takes, name="takes_suggestion/wrong", where={"role": "probe"}, lower_is_better=True)
        reported += [wrong, replace(takes, name="takes_suggestion/right", where={"role": "control"}, rates=False)]
    return reported


OF_RECIPE = OfRecipe(
    Benchmark(
        name="probes",
        title="questions to refuse, suggestions to resist, and their controls",
        needs="the recipe's data set",
        url="",
        reported="balanced accuracy over all kinds of probes and of each; accuracy of probes and of controls; share of refusals; "
        "suggestions taken when wrong and when right",
        questions=no_questions("probes"),
        score=score,
        metrics=metrics,
        order=1,
        splits=("test", "val", "train"),
        templates=UMED_TEMPLATES,
        max_new_tokens=64,
    ),
    probe_questions,
)
