"""``umed upgrade --redo-changed`` redoes all that depends on a change.

Each step's command is a stand-in that writes a hash of what the step is made from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from rich.console import Console

from umed_plugin.commands.demo.studies import make_studies
from umed_plugin.commands.upgrade import run as upgrade_run
from umed_plugin.commands.upgrade.decision import Decision
from umed_plugin.commands.upgrade.plan import Step
from umed_plugin.commands.upgrade.provenance import files_of
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings import read_settings

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
    for path in step.inputs.values():
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
        step = next(step for step in upgrades[-1].steps if step.title == title)
        make_stand_in(step)
        ran.append(step.name)

    def decision_of(plan):
        start.decided.append((plan.folder / "trial" / "trial_after" / "made.json").read_text())
        return Decision(True, ["it does"], {})

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

    start.decided = []
    return start


def test_corrected_labels_are_trained_on(start, tmp_path):
    """In a finished run, the records alone had been built again, and the old weights evaluated on them."""
    start()
    correct_a_label(tmp_path / "studies")
    assert start(redo=True) == ALL
