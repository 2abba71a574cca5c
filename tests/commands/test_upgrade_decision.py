"""``rewarding: auto``: what a trial must show, which steps follow, and a run that ends after stage 1."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.upgrade.checks import check_stages
from umed_plugin.commands.upgrade.decision import decide
from umed_plugin.commands.upgrade.gain import more_studies
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings import write_settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.commands.upgrade.summary import decision_of
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import RECIPE
from umed_plugin.evaluation.benchmarks.recipe_scoring import case_values
from umed_plugin.evaluation.metrics.metric import measure
from umed_plugin.evaluation.results import Evaluation, Prediction
from umed_plugin.grounding.scoring import AnswerScore

pytestmark = pytest.mark.one_stack
QUIET = [
    {"guard/iou_over_held_out": 0.05, "guard/accuracy_over_held_out": 0.1, "groups_without_signal": 0.4, "step": 1}
]


def evaluation(ious, wrong=0):
    right = [float(n >= wrong) for n in range(len(ious))]
    scores = [AnswerScore(ok, 1.0, iou, [], [], [(0.1, 0.1, 0.2, 0.2)]) for ok, iou in zip(right, ious)]
    cases = [
        Prediction(str(n), "", "", "", "", case_values(score, None), str(n), groups={"source": "s"})
        for n, score in enumerate(scores)
    ]
    rows = [case.row() for case in cases]
    return Evaluation("recipe", "c", "t", cases, measure(RECIPE.metrics(rows), rows))


PSEUDO = """
name: frames
description: Frames in one folder for each class.
terms: {licence: my own, url: "https://example.org"}
annotations: {reader: folders, files: ., no_finding: [normal]}
pseudo_boxes: {normal: negatives, shots: 16}
classes: {polyps: {name: polyp}}
split: {by: patient, seed: 0}
"""


def gaps(*of_questions):
    """A log in which the training studies are better by so much, over so many questions."""
    return [
        {**QUIET[0], "guard/iou_over_held_out": gap, "guard/questions_over_held_out": float(questions)}
        for gap, questions in of_questions
    ]


BOXLESS = {
    **QUIET[0],
    "reward/localization": 0.0,
    "guard/missing_boxes": 1.0,
    "guard/distinct_coordinates": 0,
    "guard/distinct_coordinates_reference": 8,
}
LOW, HIGH = evaluation([n / 40 for n in range(20)]), evaluation([n / 40 + 0.1 + n % 3 / 20 for n in range(20)])


@pytest.mark.llava
@pytest.mark.parametrize(
    ("log", "before", "after", "pays", "words"),
    [
        (QUIET, LOW, HIGH, True, "the trial has raised what held-out studies score: IoU +0.1"),
        (QUIET, HIGH, LOW, False, "its IoU fell"),
        (QUIET, LOW, LOW, False, "their mean has not risen"),
        (QUIET, LOW, evaluation([n / 40 + 0.4 for n in range(20)], wrong=6), False, "its accuracy fell"),
        ([{**QUIET[0], "guard/iou_over_held_out": 0.6}], LOW, HIGH, False, "knows the training studies by heart"),
        ([{**QUIET[0], "groups_without_signal": 1.0}], LOW, HIGH, False, "have equal rewards, and grpo learns nothing"),
        # PPO learns from differences between questions too.
        ([{**QUIET[0], "groups_without_signal": 1.0, "value_loss": 0.1}], LOW, HIGH, True, "raised"),
        # What stage 1 has made counts, and not what the trial has learnt since.
        ([*QUIET, {"guard/iou_over_held_out": 0.6, "step": 2}], LOW, HIGH, True, "raised"),
        # Over few questions chance alone crosses the limit, in either direction.
        (gaps((0.6, 8), (0.3, 32), (0.1, 64), (0.4, 64)), LOW, HIGH, True, "raised"),
        (gaps((0.1, 8), (0.1, 32), (0.3, 64), (0.1, 64)), LOW, HIGH, False, "knows the training studies by heart"),
        # A trial that ends before the window is full, and one that began with an empty window when it was resumed.
        (gaps((0.6, 8), (0.1, 16)), LOW, HIGH, True, "raised"),
        (gaps((0.1, 8), (0.3, 16)), LOW, HIGH, False, "knows the training studies by heart"),
        (gaps((0.1, 32), (0.6, 8), (0.1, 64)), LOW, HIGH, True, "raised"),
        ([], LOW, HIGH, True, "raised"),
        # Whatever names alone have gained: rewards for boxes need a box in one of the windows.
        ([BOXLESS, BOXLESS], LOW, HIGH, False, "no answer that the trial has sampled has a box"),
        ([BOXLESS, {**BOXLESS, "guard/distinct_coordinates": 4}], LOW, HIGH, True, "raised"),
        ([{**BOXLESS, "guard/missing_boxes": 0.0}], LOW, HIGH, True, "raised"),  # no study had a lesion
        ([{name: value for name, value in BOXLESS.items() if "reward" not in name}], LOW, HIGH, True, "raised"),
    ],
)
def test_what_a_trial_must_show(log, before, after, pays, words):
    decided = decide(log, before, after)
    assert decided.starts == pays and words in " ".join(decided.reasons)
    assert set(decided.as_json()["trial"]) == {"mean_iou", "accuracy", "mean"}


def shifted(gains, accuracy=()):
    """Two evaluations of as many studies: the IoU rises by ``gains``, and the accuracy of the first studies by 1 or -1."""
    before, after = evaluation([0.4] * len(gains)), evaluation([0.4 + gain for gain in gains])
    for old, new, change in zip(before.predictions, after.predictions, accuracy):
        old.values["accuracy"], new.values["accuracy"] = (0.0, 1.0) if change > 0 else (1.0, 0.0)
    return before, after


# Paired differences about +0.001, -0.040 with +0.050, and +0.0001, each with an interval around 0 or a mean that has one.
NOISY = shifted([0.001 + 0.1 * (-1) ** n for n in range(40)])
AGAINST_EACH_OTHER = shifted([-0.04 + 0.15 * (-1) ** n for n in range(40)], [1, 1, 1, 1, -1, -1])
TINY = shifted([0.0001 + 0.001 * (-1) ** n for n in range(40)])


@pytest.mark.llava
@pytest.mark.parametrize("noise", [NOISY, AGAINST_EACH_OTHER, TINY])
def test_a_gain_that_may_be_noise_is_not_said_to_be_one(noise):
    decided = decide(QUIET, *noise)
    mean, words = decided.differences["mean"], " ".join(decided.reasons)
    assert mean["difference"] > 0 > mean["ci95"][0] and decided.verdict == "cannot tell" and not decided.starts
    assert "cannot tell whether stage 2 raises" in words and "has raised" not in words and "mean +0.000 " not in words
    assert decide(QUIET, *noise, start_if_unsure=True).starts
    # More studies of the same kind tell, and about as many as was said.
    (told,) = re.findall(r"it takes about ([\d,]+) more held-out studies to tell, beside the 40 that", words)
    needed = 1 + int(told.replace(",", "")) / 40
    assert needed == pytest.approx(((mean["difference"] - mean["ci95"][0]) / mean["difference"]) ** 2, rel=0.05)


@pytest.mark.llava
def test_so_many_more_studies_tell():
    gains = [0.02 + 0.1 * (-1) ** n for n in range(40)]
    unsure = decide(QUIET, *shifted(gains))
    more = more_studies(unsure.differences["mean"])
    assert unsure.verdict == "cannot tell" and 40 < more < 80
    assert decide(QUIET, *shifted(gains * 2)).verdict == "cannot tell"
    assert decide(QUIET, *shifted(gains * 3)).verdict == "pays"


@pytest.mark.llava
def test_too_few_studies_for_an_interval_cannot_tell():
    decided = decide(QUIET, *shifted([0.2, 0.3, 0.1]))
    assert decided.verdict == "cannot tell" and "It takes at least 5 patients or images" in " ".join(decided.reasons)
    assert decided.differences["mean"]["ci95"] is None


@pytest.mark.llava
def test_the_mean_is_of_studies_with_a_lesion_and_of_all_studies():
    before, after = shifted([0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [1, 1, 1])
    for one in (before, after):
        del one.predictions[0].values["mean_iou"]
    found = decide(QUIET, before, after).differences
    assert found["mean"]["difference"] == pytest.approx((found["mean_iou"]["difference"] + 3 / 6) / 2)
    assert (found["mean_iou"]["n"], found["accuracy"]["n"], found["mean"]["n"]) == (5, 6, 6)


EARLIER = {"stage_2": "started", "because": ["the trial has raised what held-out studies score: IoU +0.001."]}


@pytest.mark.llava
def test_what_an_earlier_version_decided_by_the_same_trial_stands(tiny_mistral, tmp_path, monkeypatch):
    """Its stage 2 may be half done. Another trial is decided anew."""
    records = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    plan = upgrade_of(tiny_mistral, records, tmp_path / "run", rewarding="auto").plan
    folder, kept = plan.trial()[0].outputs[0], plan.folder / "trial" / "decision.json"
    for made in (folder, kept.parent):
        made.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": QUIET}))
    old = decide(QUIET, *NOISY).as_json()["trial"]
    del old["mean"]
    kept.write_text(json.dumps({**EARLIER, "trial": old}))
    for trial, starts in ((NOISY, True), (TINY, False)):
        sides = iter(trial)
        monkeypatch.setattr(Evaluation, "load", lambda folder, sides=sides: next(sides))
        assert decision_of(plan).starts is starts
    assert json.loads(kept.read_text())["verdict"] == "cannot tell"
    # Of a trial that was removed, the setting still decides.
    shutil.rmtree(folder)
    assert not decision_of(plan).starts
    sets = {"rewarding": "auto", "rewarding.when_unsure": "start"}
    plan = upgrade_of(tiny_mistral, records, tmp_path / "run", **sets).plan
    assert decision_of(plan).starts and decision_of(plan).as_json()["stage_2"] == "started"


@pytest.mark.llava
def test_the_decision_names_the_command_that_trains_stage_1_longer(tiny_mistral, tmp_path):
    records = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    upgrade = upgrade_of(tiny_mistral, records, tmp_path / "run", rewarding="auto", label_share=0.5)
    (tmp_path / "run").mkdir()
    write_settings(upgrade.settings, tmp_path / "run" / "run.yaml")
    words = shlex.split(upgrade.plan.longer_stage_1())
    assert words[:4] == ["umed", "upgrade", "--config", str(tmp_path / "run" / "run.yaml")]
    changes = dict(word.split("=") for word in words if "=" in word)
    longer = read_settings(
        tmp_path / "run" / "run.yaml", {key: yaml.safe_load(value) for key, value in changes.items()}
    )
    assert (longer.rewarding.run, longer.instruction_tuning.epochs, longer.label_share) == ("never", 6, None)
    assert longer.instruction_tuning.learning_rate == upgrade.settings.instruction_tuning.learning_rate


BY_HEART, ALIKE = (
    "known by heart: the trial's log has no guard/iou_over_held_out",
    "differ in their rewards: the trial's log has",
)


@pytest.mark.llava
@pytest.mark.parametrize(
    ("log", "lacking"),
    [
        (QUIET, []),
        ([], [BY_HEART, ALIKE]),
        ([{"groups_without_signal": 0.4}], [BY_HEART]),
        ([{"guard/accuracy_over_held_out": 0.1}], [ALIKE]),
        ([{"guard/accuracy_over_held_out": 0.1, "value_loss": 0.1}], []),
    ],
)
def test_what_the_log_of_a_trial_cannot_tell_is_said(log, lacking):
    for after in (HIGH, LOW):
        told = [reason for reason in decide(log, LOW, after).reasons if reason.startswith("Not judged")]
        assert len(told) == len(lacking) and all(words in reason for words, reason in zip(lacking, told))


def upgrade_of(checkpoint, records, folder, **changes):
    settings = read_settings(None, {"checkpoint": str(checkpoint), "recipe": str(records), **changes})
    return Upgrade(folder, settings, Console(quiet=True))


def records_with(folder: Path, splits) -> Path:
    from support.records import grounded_records

    file = grounded_records(folder)
    records = json.loads(file.read_text())
    for number, record in enumerate(records):
        record["split"] = splits[number % len(splits)]
    file.write_text(json.dumps(records))
    return file


def names_of(upgrade):
    return [step.name for step in upgrade.steps]


@pytest.mark.llava
def test_the_trial_comes_between_the_stages_and_held_out_records_are_answered_where_there_are_any(
    tiny_mistral, tmp_path
):
    held_out = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    plain, auto = (upgrade_of(tiny_mistral, held_out, tmp_path / "run", **more) for more in ({}, {"rewarding": "auto"}))
    trial = ["trial_of_rewarding", "checkpoint_trial", "evaluation_trial_before", "evaluation_trial_after"]
    expected = names_of(plain)
    place = expected.index("stage_2_rewarding")
    assert names_of(auto) == [*expected[:place], *trial, *expected[place:]]
    by_name = {step.name: step for step in auto.steps}
    assert all(by_name[step.name].settings == step.settings for step in plain.steps), "a run begun without it goes on"
    words = {
        name: list(by_name[name].command) for name in ("stage_1_instruction_tuning", "stage_2_rewarding", trial[0])
    }
    every = {name: w[w.index("--umed_val_every") + 1] for name, w in words.items()}
    assert every == {"stage_1_instruction_tuning": "50", "stage_2_rewarding": "20", trial[0]: "40"}
    assert words[trial[0]][words[trial[0]].index("--max_steps") + 1] == "40"
    # The trial decides about a checkpoint without boxes. So it is not refused, and neither is the stage 2 that it asks for.
    looks = {step.name for step in auto.steps if "--umed_start_check 0" in step.line()}
    assert looks == {trial[0], "stage_2_rewarding"}
    assert not any("--umed_start_check" in step.command for step in plain.steps)
    auto.plan.goes_on = False
    assert [step.name for step in auto.plan.steps()] == [*expected[:place], *trial, "checkpoint_rewarding"]
    last = auto.plan.steps()[-1]
    assert last.outputs == (auto.plan.result,) and "instruction_tuning" in str(last.inputs["trained"])

    without = records_with(tmp_path / "b", ["train", "train", "test"])
    assert not any(
        "--umed_val_every" in step.command for step in upgrade_of(tiny_mistral, without, tmp_path / "r").steps
    )
    with pytest.raises(UmedError, match="rewarding: auto decides by the studies of the split val"):
        upgrade_of(tiny_mistral, without, tmp_path / "r", rewarding="auto")
    both = read_settings(None, {"checkpoint": "c", "recipe": "mau", "rewarding": "auto", "rewarding.trial_steps": 3})
    assert (both.rewarding.run, both.rewarding.trial_steps, both.rewarding.candidates) == ("auto", 3, 8)


@pytest.mark.llava
def test_the_trial_logs_each_step_whatever_stage_2_logs(tiny_mistral, tmp_path):
    records = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    sets = {"rewarding": "auto", "rewarding.flags": {"logging_steps": 50, "logging_strategy": "no"}}
    by_name = {
        step.name: list(step.command) for step in upgrade_of(tiny_mistral, records, tmp_path / "r", **sets).steps
    }
    trial, stage = by_name["trial_of_rewarding"], by_name["stage_2_rewarding"]
    for flag, of_trial, of_stage in (("--logging_steps", "1", "50"), ("--logging_strategy", "steps", "no")):
        assert (trial[trial.index(flag) + 1], stage[stage.index(flag) + 1]) == (of_trial, of_stage)


@pytest.mark.llava
def test_flags_are_checked_as_they_will_be_given(tiny_mistral, tmp_path):
    """The plan adds --umed_val_every where the records have a split val, without which --umed_stop_after is refused."""
    stops, shards = ({"instruction_tuning.flags": flags} for flags in ({"umed_stop_after": 3}, {"fsdp": "full_shard"}))
    with_val, without = (
        records_with(tmp_path / n, s) for n, s in (("a", ["train", "val", "test"]), ("b", ["train", "test"]))
    )
    upgrade_of(tiny_mistral, with_val, tmp_path / "run", **stops)
    words = r"instruction_tuning: --umed_stop_after.* without --umed_val_every.*The records have no split val"
    with pytest.raises(UmedError, match=words):
        upgrade_of(tiny_mistral, without, tmp_path / "run", **stops)
    with pytest.raises(UmedError, match="instruction_tuning: --fsdp: LLaVA cannot start under FSDP"):
        upgrade_of(tiny_mistral, without, tmp_path / "run", **shards)
    # Nobody knows before a recipe's records are built.
    upgrade = upgrade_of(tiny_mistral, "demo_studies", tmp_path / "run", **stops)
    check_stages(upgrade.settings, upgrade.origin, has_val=True)
    check_stages(upgrade.settings, upgrade.origin, has_val=None)
    with pytest.raises(UmedError, match="--umed_stop_after"):
        check_stages(upgrade.settings, upgrade.origin, has_val=False)


@pytest.mark.llava
def test_labels_that_no_stage_would_use_are_not_set_aside_in_silence(tiny_mistral, tmp_path, monkeypatch):
    records = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    with pytest.raises(
        UmedError, match="label_share: 0.4 keeps the other labelled studies for stage 2, and rewarding: never"
    ):
        upgrade_of(tiny_mistral, records, tmp_path / "run", rewarding="never", label_share=0.4)
    # By the flag, it is asked for stage 1 alone.
    by_hand = {"instruction_tuning.flags": {"umed_label_share": 0.4}}
    upgrade_of(tiny_mistral, records, tmp_path / "run", rewarding="never", **by_hand)
    plan = upgrade_of(tiny_mistral, records, tmp_path / "run", rewarding="auto", label_share=0.4).plan
    training = plan.trial()[0]
    monkeypatch.setattr(Evaluation, "load", lambda folder: LOW)
    training.outputs[0].mkdir(parents=True)
    (training.outputs[0] / "trainer_state.json").write_text(json.dumps({"log_history": QUIET}))
    for _ in ("decided", "read again"):
        found = decision_of(plan)
        assert not found.starts and "nothing has trained on the others" in found.as_json()["because"][-1]
        shutil.rmtree(training.outputs[0], ignore_errors=True)


def benchmarks_of(upgrade):
    """Evaluation -> what it asks, and its folder of data if it is given one."""
    found = {}
    for step in upgrade.steps:
        if "evaluate" in step.command:
            words = dict(zip(step.command, step.command[1:]))
            found[step.name.removeprefix("evaluation_")] = (words["--benchmark"], words.get("--data-root"))
    return found


def without_a_persons_boxes(file: Path) -> Path:
    records = json.loads(file.read_text())
    for record in records:
        record["provenance"]["boxes"] = "pseudo"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.llava
def test_the_trial_is_judged_on_the_held_out_studies_of_the_training_records(tiny_mistral, tmp_path):
    """evaluation.recipe names studies for the test; it need not have a val."""
    trained_on = records_with(tmp_path / "a", ["train", "train", "val", "test"])
    measured_on = records_with(tmp_path / "b", ["test"])
    sets = {"rewarding": "auto", "evaluation.recipe": str(measured_on)}
    upgrade = upgrade_of(tiny_mistral, trained_on, tmp_path / "run", **sets)
    stages = dict.fromkeys(("base", "instruction_tuning", "rewarding"), (str(measured_on), None))
    trial = dict.fromkeys(("trial_before", "trial_after"), (str(trained_on), None))
    assert benchmarks_of(upgrade) == {**stages, **trial}
    by_name = {step.name: step for step in upgrade.steps}
    before = by_name["evaluation_trial_before"]
    assert before.inputs["records"] == trained_on and "evaluation.recipe" not in before.settings
    assert by_name["evaluation_base"].settings["evaluation.recipe"] == str(measured_on)
    with pytest.raises(UmedError, match=r"b/records.json has none. Give the recipe a val split"):
        upgrade_of(tiny_mistral, measured_on, tmp_path / "run", **{**sets, "evaluation.recipe": str(trained_on)})


@pytest.mark.llava
def test_where_no_person_drew_boxes_the_val_of_the_evaluations_recipe_judges(tiny_mistral, tmp_path):
    """It is looked for before anything runs: the trial comes after all of stage 1."""
    frames = tmp_path / "frames.yaml"
    frames.write_text(PSEUDO)
    for name, val in (("with", 4), ("without", 0)):
        make_studies(tmp_path / name, train=4, val=val, test=4)
    sets = {"rewarding": "auto", "evaluation.recipe": "demo_studies"}
    root = str(tmp_path / "with")
    upgrade = upgrade_of(tiny_mistral, frames, tmp_path / "run", **sets, **{"evaluation.data_root": root})
    assert set(benchmarks_of(upgrade).values()) == {("demo_studies", root)} and len(benchmarks_of(upgrade)) == 5
    refused = "demo_studies has no split val with true boxes. Give it one, or set rewarding.run to always"
    lacking = {"evaluation.data_root": str(tmp_path / "without")}
    with pytest.raises(UmedError, match=refused):
        upgrade_of(tiny_mistral, frames, tmp_path / "run", **sets, **lacking)
    upgrade_of(tiny_mistral, frames, tmp_path / "run", **{**sets, "rewarding": "always"}, **lacking)
    (tmp_path / "unmounted").mkdir()
    upgrade_of(tiny_mistral, frames, tmp_path / "run", **sets, **{"evaluation.data_root": str(tmp_path / "unmounted")})


@pytest.mark.llava
def test_records_with_pseudo_boxes_in_their_val_need_another_judge(tiny_mistral, tmp_path):
    drawn_by_none = without_a_persons_boxes(records_with(tmp_path / "a", ["train", "val"]))
    held_out, test = (
        records_with(tmp_path / name, splits) for name, splits in (("b", ["val", "test"]), ("c", ["test"]))
    )
    pseudo = without_a_persons_boxes(records_with(tmp_path / "d", ["val", "test"]))

    def judged(**sets):
        return upgrade_of(tiny_mistral, drawn_by_none, tmp_path / "run", rewarding="auto", **sets)

    assert benchmarks_of(judged(**{"evaluation.recipe": str(held_out)}))["trial_after"] == (str(held_out), None)
    with pytest.raises(UmedError, match="no person drew the boxes of .*a/records.json .*it is not set"):
        judged()
    for file in (test, pseudo):
        with pytest.raises(UmedError, match=f"{file} has no split val with true boxes"):
            judged(**{"evaluation.recipe": str(file)})


@pytest.mark.run
@pytest.mark.llava
def test_a_run_whose_trial_does_not_pay_ends_after_stage_1(tiny_mistral, tmp_path):
    """Random weights write no boxes. A run of 20 steps would be refused for that, and a trial decides."""
    from support.umed_runs import environment, run_python

    records = records_with(tmp_path / "data", ["train", "train", "val", "test"])
    sizes = {"instruction_tuning.steps": 1, "rewarding.trial_steps": 1, "rewarding.max_new_tokens": 4}
    sizes |= {"rewarding.flags": "{umed_start_check: 16}"}  # as a trial of 20 steps or more has by itself
    sizes |= {"evaluation.max_new_tokens": 4, "rewarding.candidates": 2, "instruction_tuning.batch_size": 2}
    sets = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    command = [
        "-m",
        "umed_plugin.cli",
        "upgrade",
        str(tiny_mistral),
        "--recipe",
        str(records),
        "--out",
        str(tmp_path / "out"),
    ]
    done = run_python([*command, "--set", "rewarding=auto", *sets], env=environment(), forks_too=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "rewarding: auto: the run ends with stage 1: no answer that the trial has sampled has a box" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rewarding_auto"]["stage_2"] == "left out" and "rewarding" not in summary
    result = tmp_path / "out" / "checkpoint" / f"{tiny_mistral.name}-umed"
    assert json.loads((result / "umed_manifest.json").read_text())["evaluation"].keys() == {
        "base",
        "instruction_tuning",
    }
    assert (tmp_path / "out" / "report.html").is_file() and not (
        tmp_path / "out" / "runs" / "rewarding-llava-mistral"
    ).exists()
    tuned = tmp_path / "out" / "runs" / "instruction_tuned-llava-mistral"
    weights = {file.name for file in tuned.glob("*.safetensors")} | {file.name for file in tuned.glob("*.bin")}
    assert weights and all((result / name).read_bytes() == (tuned / name).read_bytes() for name in weights)
    shutil.rmtree(tmp_path / "out" / "runs" / "trial-llava-mistral")
    again = run_python([*command, "--set", "rewarding=auto", *sets], env=environment(), forks_too=True, timeout=300)
    assert again.returncode == 0 and "stage 2 was left out" in again.stdout
