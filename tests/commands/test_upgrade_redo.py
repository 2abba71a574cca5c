"""Files that settings of `umed upgrade` name count as settings do, and ``--redo-changed`` redoes all that depends on a change.

Each step's command is a stand-in that writes a hash of what the step is made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.upgrade import run as upgrade_run
from umed_plugin.commands.upgrade.decision import CANNOT_TELL, PAYS, Decision
from umed_plugin.commands.upgrade.named_files import named_files
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.provenance import files_of
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings import Settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.errors import UmedError

pytestmark = [pytest.mark.one_stack, pytest.mark.llava]
SYMBOLS = "steps: {side: {left: [left]}}\ncases: [{side: left}]\n"
OF_TRIAL = ["trial_of_rewarding", "checkpoint_trial", "evaluation_trial_after"]
OF_STAGE_2 = ["stage_2_rewarding", "checkpoint_rewarding", "evaluation_rewarding"]
ALL = [
    *("records", "evaluation_base", "stage_1_instruction_tuning", "checkpoint_instruction_tuning"),
    *("evaluation_instruction_tuning", *OF_TRIAL[:2], "evaluation_trial_before", OF_TRIAL[2], *OF_STAGE_2),
]


def make_stand_in(step: Step) -> None:
    digest = hashlib.sha256(json.dumps([dict(step.settings), dict(step.stamps())], default=str).encode())
    for path in (*step.inputs.values(), *step.files.values()):
        for file in files_of(path):
            digest.update(file.read_bytes())
    for output in step.outputs:
        folder = output.parent if output.suffix else output
        folder.mkdir(parents=True, exist_ok=True)
        records = [{"split": split, "made_from": digest.hexdigest()} for split in ("train", "val", "test")]
        (output if output.suffix else folder / "made.json").write_text(json.dumps(records))


def correct_a_label(folder: Path) -> None:
    table = folder / "annotations.csv"
    text = table.read_text()
    assert ",effusion," in text
    table.write_text(text.replace(",effusion,", ",cyst,", 1))


@pytest.fixture
def start(tiny_mistral, tmp_path, monkeypatch):
    """A function that starts the upgrade and returns the names of the steps that ran; ``decided`` counts the trial's verdicts."""
    ran: list[str] = []
    upgrades: list[Upgrade] = []

    def run_logged(command, log, title, **_):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        step = next(step for step in upgrades[-1].steps if step.command == command)
        make_stand_in(step)
        ran.append(step.name)

    def decision_of(plan):
        start.decided.append((plan.folder / "trial" / "trial_after" / "made.json").read_text())
        unsure = start.verdict == CANNOT_TELL
        starts = plan.settings.rewarding.when_unsure == "start" if unsure else start.verdict == PAYS
        return Decision(start.verdict, starts, ["so it is"], {})

    monkeypatch.setattr(upgrade_run, "run_logged", run_logged)
    monkeypatch.setattr(upgrade_run, "decision_of", decision_of)
    monkeypatch.setattr(upgrade_run, "print_summary", lambda *_: None)
    # Its rules for DeepSpeed are not what is tested here.
    monkeypatch.setattr(upgrade_run, "check_together", lambda *_: None)
    monkeypatch.setattr(upgrade_run, "check_stages", lambda *_: None)
    for name in ("_examine", "_warn_of_no_boxes", "_conclude"):
        monkeypatch.setattr(Upgrade, name, lambda *_: None)
    make_studies(tmp_path / "studies", train=6, val=2, test=2)
    for name, text in (("steps.yaml", SYMBOLS), ("zero2.json", "{}"), ("tower.pth", "weights")):
        (tmp_path / name).write_text(text)

    def start(redo: bool = False, **changes: object) -> list[str]:
        ran.clear()
        given = {"checkpoint": str(tiny_mistral), "recipe": "demo_studies", "data_root": str(tmp_path / "studies")}
        given |= {"rewarding.rewards": ["localization", f"symbolic:{tmp_path}/steps.yaml"], "rewarding.run": "auto"}
        given |= {"deepspeed": str(tmp_path / "zero2.json"), "device": "cpu"}
        upgrades.append(Upgrade(tmp_path / "run", read_settings(None, {**given, **changes}), Console(quiet=True), redo))
        upgrades[-1].run()
        return [*ran]

    start.decided, start.verdict = [], PAYS
    return start


def test_an_edited_file_of_a_reward_is_named_and_stage_2_and_its_decision_are_redone(start, tmp_path):
    assert start() == ALL and start() == []
    (tmp_path / "steps.yaml").write_text(SYMBOLS + "# another\n")
    said = r"stage 2: rewarding: rewarding.rewards\[1\] \(.*steps.yaml\) is not the file that it was"
    with pytest.raises(UmedError, match=f"trial of {said}.*\n  {said}"):
        start()
    before = start.decided[-1]
    assert start(redo=True) == [*OF_TRIAL, *OF_STAGE_2]
    assert start.decided[-1] != before, "the new trial has decided"
    assert start() == []


def test_a_run_that_ended_because_its_trial_could_not_tell_goes_on_with_stage_2(start):
    start.verdict = CANNOT_TELL
    ended = [*ALL[: ALL.index("stage_2_rewarding")], "checkpoint_rewarding"]
    assert start() == ended and start() == []
    unsure = {"rewarding.when_unsure": "start"}
    with pytest.raises(
        UmedError, match="(?s)checkpoint of stage 2.*redo them and the steps that depend on them with --redo-changed"
    ):
        start(**unsure)
    assert start(redo=True, **unsure) == OF_STAGE_2[1:] and start(**unsure) == []


def test_a_trial_that_is_redone_decides_anew_after_one_that_ended_the_run(start, tmp_path):
    start.verdict = CANNOT_TELL
    start()
    (tmp_path / "steps.yaml").write_text(SYMBOLS + "# another\n")
    start.verdict = PAYS
    assert start(redo=True) == [*OF_TRIAL, *OF_STAGE_2]


def test_other_files_of_settings_are_compared_before_anything_runs(start, tmp_path):
    flags = {"umed_tower_lr": 1e-6, "umed_tower_teacher": str(tmp_path / "tower.pth")}
    assert start(**{"instruction_tuning.flags": flags}) == ALL
    (tmp_path / "tower.pth").write_text("others")
    (tmp_path / "run" / "made" / "evaluation_rewarding.json").unlink()
    said = r"stage 1: instruction tuning: instruction_tuning.flags.umed_tower_teacher \(.*tower.pth\) is not the file"
    with pytest.raises(UmedError, match=said):
        start(**{"instruction_tuning.flags": flags})
    (tmp_path / "tower.pth").write_text("weights")
    shutil.rmtree(tmp_path / "run" / "evaluation" / "rewarding")
    assert start(**{"instruction_tuning.flags": flags}) == ["evaluation_rewarding"]
    (tmp_path / "zero2.json").write_text('{"a": 1}')
    with pytest.raises(UmedError, match=r"stage 1: instruction tuning: deepspeed \(.*zero2.json\) is not the file"):
        start(**{"instruction_tuning.flags": flags})


def test_a_run_of_an_earlier_version_is_not_refused_for_files_that_it_did_not_note(start, tmp_path):
    start()
    for file in (tmp_path / "run" / "made").glob("*.json"):
        record = json.loads(file.read_text())
        record["inputs"] = {role: state for role, state in record["inputs"].items() if "rewards" not in role}
        file.write_text(json.dumps(record))
    (tmp_path / "steps.yaml").write_text(SYMBOLS + "# another\n")
    assert start() == []
    (tmp_path / "zero2.json").write_text('{"a": 1}')
    with pytest.raises(UmedError, match="deepspeed"):  # which it did note
        start()


def test_corrected_labels_are_trained_on(start, tmp_path):
    """In a finished run, the records alone had been built again, and the old weights evaluated on them."""
    start()
    correct_a_label(tmp_path / "studies")
    assert start(redo=True) == ALL


def test_corrected_labels_of_the_evaluations_recipe_are_noticed(start, tmp_path):
    make_studies(tmp_path / "measured", seed=1, train=1, val=1, test=3)
    given = {"evaluation.recipe": "demo_studies", "evaluation.data_root": str(tmp_path / "measured")}
    start(**given)
    correct_a_label(tmp_path / "measured")
    with pytest.raises(UmedError, match="evaluation: base: data in .*measured, .*annotations or images have changed"):
        start(**given)
    assert start(redo=True, **given) == ["evaluation_base", "evaluation_instruction_tuning", "evaluation_rewarding"]


def test_which_files_a_stage_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("teacher", "cache", "data"):
        (tmp_path / folder).mkdir()
    for name in ("teacher/config.json", "cache/config.json", "prompt.txt", "judge.jsonl", "a.yaml", "lexical.txt"):
        (tmp_path / name).touch()
    flags = {"umed_teacher": "teacher", "umed_image_cache": "cache", "umed_data_root": "data", "umed_keep": 0.1}
    flags |= {"report_to": "none", "umed_recipe": "mau", "run_name": "prompt.txt", "umed_unknown": ""}
    settings = Settings(checkpoint="c", recipe="r", instruction_tuning={"flags": flags})
    found = named_files("instruction_tuning", settings.instruction_tuning, settings)
    assert found.pop("instruction_tuning.flags.umed_teacher/config.json") == tmp_path / "teacher" / "config.json"
    assert {name.rpartition(" ")[0] for name in found} == {"instruction_tuning.flags.umed_recipe"}
    assert {"mau.yaml", "tbx11k.yaml"} < {path.name for path in found.values()}, "a mixture and its sources"
    flags = {"umed_judge": "replay:judge.jsonl", "umed_judge_prompt": str(tmp_path / "prompt.txt")}
    rewards = ["relevance", "symbolic:a.yaml", "my_module:my_reward"]
    settings = Settings(checkpoint="c", recipe="r", rewarding={"rewards": rewards, "flags": flags})
    assert named_files("rewarding", settings.rewarding, settings) == {
        "rewarding.rewards[1]": tmp_path / "a.yaml",
        "rewarding.flags.umed_judge": tmp_path / "judge.jsonl",
        "rewarding.flags.umed_judge_prompt": tmp_path / "prompt.txt",
    }


def test_only_what_a_training_takes_from_a_checkpoint_is_compared(tiny_mistral, tmp_path):
    """And a value that is too long for a path is none."""
    teacher = shutil.copytree(tiny_mistral, tmp_path / "teacher")
    flags = {"umed_teacher": str(teacher), "umed_judge_options": json.dumps({"schema": "x" * 5000})}
    settings = Settings(checkpoint=str(tiny_mistral), recipe="demo_studies", instruction_tuning={"flags": flags})
    named = named_files("instruction_tuning", settings.instruction_tuning, settings)
    assert named["instruction_tuning.flags.umed_teacher/config.json"] == teacher / "config.json"
    weights = [role for role in named if role.endswith((".safetensors", ".bin"))]
    assert weights and len(named) == 1 + len(weights)
    (teacher / "README.md").write_text("of no effect")
    assert named_files("instruction_tuning", settings.instruction_tuning, settings) == named
