"""`umed upgrade` continues folders that version 0.1.0 wrote before its modules were moved, and reads summaries of `umed demo`.

``tests/support/old/upgrade`` is a finished upgrade without its weights, ``tests/support/old/demo`` the summary of a demo. Paths
of the machine that wrote them stand as ``@FOLDER@``; stand-ins take the place of weights. (Tried once with weights: a training
that was killed under the old modules and finished under the new ones gave the same weights, bit for bit, as one that was not.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from support.report_runs import SHIFTS, make_records, write_evaluation

from umed_plugin import cli
from umed_plugin.commands.report.page import write_report
from umed_plugin.commands.upgrade.provenance import MANIFEST
from umed_plugin.commands.upgrade.run import Upgrade
from umed_plugin.commands.upgrade.settings import RUN_FILE, Settings
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.commands.upgrade.summary import summarise
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe_scoring import HEADLINE
from umed_plugin.evaluation.results import Evaluation, compare
from umed_plugin.evaluation.stages_table import stages_table
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.rules import STAGES

pytestmark = pytest.mark.one_stack
OLD = Path(__file__).resolve().parents[1] / "support" / "old"
STEPS = (
    *("records", "evaluation_base", "stage_1_instruction_tuning", "checkpoint_instruction_tuning"),
    *("evaluation_instruction_tuning", "stage_2_rewarding", "checkpoint_rewarding", "evaluation_rewarding"),
)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The old upgrade in ``tmp_path/run``, with its input and its recipe beside it."""
    shutil.copytree(OLD / "upgrade", tmp_path, dirs_exist_ok=True)
    (tmp_path / "studies").mkdir()
    (tmp_path / "tiny-llava-mistral" / "vision_tower").mkdir()
    run, moved = tmp_path / "run", set()
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        text = file.read_text()
        if "@FOLDER@" in text:
            file.write_text(text.replace("@FOLDER@", str(tmp_path)))
            moved.add(file)
    for file in run.glob("made/*.json"):
        record = read(file)
        states = {run / name: state for name, state in record["outputs"].items()}
        states.update({Path(state["path"]): state for state in record["inputs"].values()})
        for path, state in states.items():
            if not path.exists() and run in path.parents:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"stands in for {path.name}")
                moved.add(path)
            if path in moved:  # all other files have the hashes that the old version wrote
                state["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        file.write_text(json.dumps(record))
    return run


def upgrade_of(run: Path, **changes: object) -> Upgrade:
    return Upgrade(run, read_settings(run / RUN_FILE, changes), Console(quiet=True))


@pytest.mark.llava
def test_nothing_of_an_old_run_is_taken_for_changed(folder):
    upgrade = upgrade_of(folder)
    assert tuple(step.name for step in upgrade.steps) == STEPS
    for step in upgrade.steps:
        assert upgrade.provenance.differences(step, inputs=True) == []
        assert upgrade.provenance.damage(step) == []
        assert upgrade.provenance.is_done(step)
    # It is the settings that are compared, not the command, whose module may have moved.
    record = upgrade.provenance.read(upgrade.steps[2])
    record["command"][:2] = ["python", "-m", "umed_plugin.somewhere_else"]
    (folder / "made" / f"{STEPS[2]}.json").write_text(json.dumps(record))
    assert upgrade_of(folder).provenance.differences(upgrade.steps[2], inputs=True) == []


@pytest.mark.llava
def test_a_run_that_goes_on_says_first_what_is_kept_and_from_where(folder, monkeypatch):
    """Stage 2 was killed behind its second checkpoint; then everything is there."""

    def stop(*_: object, **__: object) -> None:
        raise UmedError("stopped by the test")

    def told() -> list[str]:
        shown = io.StringIO()
        upgrade = Upgrade(folder, read_settings(folder / RUN_FILE, {}), Console(file=shown))
        with contextlib.suppress(UmedError):
            upgrade.run()
        return [line for line in shown.getvalue().splitlines() if line.startswith("kept")]

    monkeypatch.setattr("umed_plugin.commands.upgrade.run.run_logged", stop)
    monkeypatch.setattr(Upgrade, "_conclude", stop)
    assert told() == [], "nothing is left to run"
    for step in STEPS[6:]:
        (folder / "made" / f"{step}.json").unlink()
    stage_2 = folder / "made" / f"{STEPS[5]}.json"
    stage_2.write_text(json.dumps({**read(stage_2), "outputs": None}))
    for number in (9, 10):
        (folder / "runs" / "rewarding-llava-mistral" / f"checkpoint-{number}").mkdir(parents=True)
    shutil.rmtree(folder / "checkpoint")
    kept = (
        "kept from the earlier start: records by recipe drawn, evaluation: base, stage 1: instruction tuning, "
        "checkpoint of stage 1: instruction tuning, evaluation: instruction tuning (5 of 8 steps). "
    )
    assert told() == [f"{kept}Goes on with stage 2: rewarding, from its checkpoint-10."]
    shutil.rmtree(folder / "runs" / "rewarding-llava-mistral")
    assert told() == [f"{kept}Goes on with stage 2: rewarding, from its beginning: it has no checkpoint yet."]
    stage_2.unlink()
    assert told() == [f"{kept}Goes on with stage 2: rewarding."]


@pytest.mark.llava
def test_an_old_run_is_gone_on_with_from_its_evaluations(folder):
    """Killed behind its last step, it writes summary, manifest and report; no step runs, and the numbers are the old ones."""
    old, result = read(folder / "summary.json"), folder / "checkpoint" / "tiny-llava-mistral-umed"
    manifest = read(result / MANIFEST)
    (folder / "summary.json").unlink()
    records = {file: file.read_bytes() for file in folder.glob("made/*.json")}

    summary = upgrade_of(folder).run()

    assert {file: file.read_bytes() for file in folder.glob("made/*.json")} == records and not (
        folder / "logs"
    ).exists()
    for stage in ("base", *STAGES):
        # Two intervals of one metric stood there, both from few patients. The values stay, the intervals are computed anew.
        figures = old[stage].pop("figures")
        found = Evaluation.load(folder / "evaluation" / stage).metrics
        assert {name: (one["value"], one["n"]) for name, one in found.items()} == {
            name: (one["value"], one["n"]) for name, one in figures.items()
        }
        expected = {**old[stage], **{f"{name}_ci95": found[name]["ci95"] for name in HEADLINE}}
        assert {name: summary[stage][name] for name in expected} == expected
    assert set(old) <= set(summary) and summary["seed"] == old["seed"]
    for comparison in ("comparison", "comparison_with_base"):
        assert {name: (one["difference"], one["n"]) for name, one in summary[comparison].items()} == {
            name: (one["difference"], one["n"]) for name, one in old[comparison]["figures"].items()
        }
    assert "stage 2" in (folder / "report.html").read_text()
    new = read(result / MANIFEST)
    assert set(new) == set(manifest)
    # The settings are newer than the run, which goes on with their defaults.
    expected = {**manifest["settings"], "bits": 16, "augment": False, "label_share": None}
    expected["evaluation"] = {**expected["evaluation"], "recipe": None, "data_root": None}
    expected["lora"] = {**expected["lora"], "targets": None}
    expected["rewarding"] = {**expected["rewarding"], "run": "always", "trial_steps": 40, "when_unsure": "leave_out"}
    assert new["settings"] == expected
    # A training of today would also look at held-out studies.
    today = [re.sub(r" --umed_val_every \d+", "", line) for line in new["commands"]]
    assert [shlex.split(line)[-6:] for line in today] == [shlex.split(line)[-6:] for line in manifest["commands"]]


@pytest.mark.llava
def test_the_same_predictions_have_one_interval_in_evaluate_report_and_upgrade(folder, tmp_path):
    """To the last digit, over patients: in evaluation.json, in the page's numbers, and in summary.json."""
    records = make_records(tmp_path / "data", 28)
    for stage in SHIFTS:
        write_evaluation(folder, stage, records)
    upgrade = upgrade_of(folder)
    summary = summarise(upgrade.plan, upgrade.decision)
    page = write_report(folder).read_text()
    shown = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["metrics"]
    labels = ("base", "stage 1", "stage 2")
    ways = set()
    for stage, label in zip(SHIFTS, labels):
        evaluated = read(folder / "evaluation" / stage / "evaluation.json")["metrics"]
        assert shown["stages"][label] == evaluated
        for name in HEADLINE:
            assert summary[stage][f"{name}_ci95"] == evaluated[name]["ci95"]
            assert summary[stage]["intervals"][name]["units"] == evaluated[name]["units"] == 7
            ways.add(evaluated[name]["interval"])
            interval = evaluated[name]["ci95"]
            assert ("no interval" if interval is None else "{:.3f} to {:.3f}".format(*interval)) in page
    assert ways == {"bootstrap", "exact", "undefined"}, "every kind of interval is compared"
    after = compare(folder / "evaluation" / "instruction_tuning", folder / "evaluation" / "rewarding")
    assert summary["comparison"] == after == shown["differences"]["stage 2 − stage 1"]


@pytest.mark.llava
def test_a_stage_1_without_boxes_is_said_before_stage_2(folder, tmp_path, capsys):
    upgrade = Upgrade(folder, read_settings(folder / RUN_FILE, {}), Console(width=400))
    records = make_records(tmp_path / "data", 8)
    for stage, said in (
        ("rewarding", False),
        ("base", True),
    ):  # the answers of one have boxes, those of the other have none
        shutil.rmtree(folder / "evaluation" / "instruction_tuning")
        write_evaluation(folder, stage, records)
        shutil.copytree(folder / "evaluation" / stage, folder / "evaluation" / "instruction_tuning")
        upgrade._warn_of_no_boxes()
        assert ("after stage 1 no answer has a box" in capsys.readouterr().out) == said


@pytest.mark.llava
def test_a_stage_that_an_old_version_began_is_gone_on_with(folder):
    upgrade = upgrade_of(folder)
    training = upgrade.steps[5]
    assert training.name == "stage_2_rewarding"
    file = folder / "made" / f"{training.name}.json"
    file.write_text(json.dumps({**read(file), "outputs": None}))
    (training.outputs[0] / "checkpoint-2").mkdir()
    again = upgrade_of(folder)
    assert not again.provenance.is_done(training)
    again._handle_changes([(training, again.provenance.differences(training, inputs=True))])
    again.provenance.begin(training)
    assert (training.outputs[0] / "checkpoint-2").is_dir(), "what the trainer resumes from is still there"
    with pytest.raises(UmedError, match="rewarding.candidates was 4 and is 5"):
        upgrade_of(folder, **{"rewarding.candidates": 5}).run()


@pytest.mark.llava
def test_a_swap_that_an_old_version_began_is_ended(folder):
    checkpoint, result = folder.parent / "tiny-llava-mistral", folder / "checkpoint" / "tiny-llava-mistral-umed"
    backup = checkpoint.with_name(f"{checkpoint.name}.before-umed")
    state = folder / "made" / "in_place.json"
    state.write_text(json.dumps({"result": str(result), "old": str(backup), "done": False}))
    checkpoint.rename(backup)
    shutil.copytree(result, folder.parent / f"{checkpoint.name}.umed-new")
    upgrade_of(folder, in_place=True).run()
    assert (checkpoint / "model.safetensors").read_bytes() == (result / "model.safetensors").read_bytes()
    assert backup.is_dir() and read(state)["done"] is True
    shutil.copy(
        backup / "config.json", checkpoint
    )  # the old run's own stands for a file, and holds none of its settings
    shutil.rmtree(backup)
    upgrade_of(folder, in_place=True).run()
    assert (checkpoint / "model.safetensors").read_bytes() == (result / "model.safetensors").read_bytes()
    assert not backup.exists()


def test_an_old_manifest_says_what_todays_commands_and_settings_take(folder):
    manifest = read(folder / "checkpoint" / "tiny-llava-mistral-umed" / MANIFEST)
    assert Settings(**manifest["settings"]) == read_settings(folder / RUN_FILE, {})
    flags = {flag.name for flag in dataclasses.fields(UmedFlags)}
    for words in map(shlex.split, manifest["commands"]):
        if words[0].endswith("/umed"):
            cli.build_parser().parse_args(words[1:])
        else:
            assert {word[2:] for word in words if word.startswith("--umed_")} <= flags
    assert len(manifest["commands"]) == len(STEPS)


def test_the_summary_of_an_old_demo_is_shown(capsys):
    summary = read(OLD / "demo" / "summary.json")
    stages = {stage: summary[stage] for stage in ("base", *STAGES)}
    Console(width=200).print(stages_table(stages, summary["comparison"]))
    shown = capsys.readouterr().out
    for metric in ("accuracy", "mean_iou", "acc_at_50", "vision_relevance"):
        low, high = summary["rewarding"][f"{metric}_ci95"]
        assert f"{summary['rewarding'][metric]:.3f} [{low:.3f}, {high:.3f}]" in shown
    assert f"{summary['comparison']['mean_iou']['difference']:+.3f}" in shown and summary["seed"] == 0
