"""The study benchmark: its plan, its rows, its table, and a tiny study from end to end that is killed and goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import box_shapes
import pytest
import study
import study_data
import study_plan
import study_recipes
import study_rows
import study_sampling
import study_table
import study_training
import yaml
from study_plan import Cell
from support import forked
from support.llava_args import llava_args
from support.records import grounded_records
from support.umed_runs import ROOT, run_command

from umed_plugin.commands import processes
from umed_plugin.data.records import load_records
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.evaluation.metrics.metric import Row
from umed_plugin.evaluation.results import Evaluation, Prediction
from umed_plugin.flags.checks import find_faults
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.flags.rules import REWARDING, TUNING

pytestmark = pytest.mark.one_stack
TINY = {
    "name": "tiny",
    "title": "Tiny",
    "question": "Does it run?",
    "data": {"train": 8, "val": 2, "test": 4},
    "base_captions_epochs": 1,
    "sizes": [4],
    "seeds": [1],
    "tuning_seed": 7,
    "tuning": "none",
    "budget": "stage 2",
    "flags": {"per_device_train_batch_size": 2, "umed_stock_template_share": 1},
    "stages": {2: {"umed_num_candidates": 2, "umed_max_new_tokens": 8, "umed_start_check": 0}},
    "arms": {
        "stage 1": {
            "start": "base",
            "steps": 2,
            "flags": {"umed_val_every": 1, "umed_stop_after": 1, "umed_max_new_tokens": 8},
        },
        "stage 2": {"start": "stage 1", "stage": 2, "steps": 1},
        "stage 1 continued": {"start": "stage 1", "steps": "equal"},
    },
    "against": "stage 1 continued",
    "figure": ["stage 2"],
}


def changed(**parts) -> dict:
    return {**json.loads(json.dumps(TINY)), "stages": TINY["stages"], **parts}


def loaded(tmp_path: Path, content: dict) -> study_plan.Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    return study_plan.load_study(file)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_that_is_shipped_can_be_read(file):
    found = study_plan.load_study(file)
    assert found.name == file.stem and len(set(found.seeds)) >= 3
    cells = list(study_plan.cells(found, found.seeds, found.sizes))
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(study_plan.digest(found, cell) for cell in cells)
    for variant, arm in {(cell.variant, cell.arm) for cell in cells}:
        given = study_plan.flags_of(found, variant, arm)
        own = {name: value for name, value in given.items() if name.startswith("umed_")}
        stage = TUNING if found.arms[arm].stage == 1 else REWARDING
        faults = find_faults(UmedFlags(umed_stage=stage, **own), *llava_args(), files=False)
        assert not [fault for fault in faults if any(f"--{name}" in fault for name in own)], (variant, arm)


def test_faults_of_a_study_come_at_once(tmp_path):
    arms = {"a": {"start": "b", "steps": 1}, "b": {"start": "base", "steps": "equal"}}
    with pytest.raises(UmedError) as error:
        loaded(tmp_path, changed(arms=arms, budget="b", against="c", figure=[], seeds=[7]))
    told = str(error.value)
    assert (
        "arms.a.start: 'b' is not 'base' nor an arm above" in told
        and "arms.b.steps: is equal to its own budget" in told
    )
    assert "against" in told and "tuning_seed: 7 is among the reported seeds" in told


def test_a_study_goes_by_another_file_where_it_says_nothing_itself(tmp_path):
    common = changed(flags={"umed_stock_template_share": 1, "learning_rate": 0.1})
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(common))
    own = {key: TINY[key] for key in ("name", "title", "question", "sizes")}
    own |= {
        "like": "common.yaml",
        "flags": {"learning_rate": 0.2},
        "shared_arms": ["stage 1", "stage 2"],
        "against": None,
    }
    own |= {"figure": [], "stages": {2: {"umed_num_candidates": 4}}, "arms": {"more": {"start": "stage 1", "steps": 3}}}
    found = loaded(tmp_path, own)
    assert list(found.arms) == ["stage 1", "stage 2", "more"] and found.seeds == [1]
    assert found.flags == {"umed_stock_template_share": 1, "learning_rate": 0.2}
    assert found.stages[2] == {**TINY["stages"][2], "umed_num_candidates": 4}
    with pytest.raises(UmedError, match="shared_arms"):
        loaded(tmp_path, {**own, "shared_arms": ["stage 1", "stage 3", "stage 2"]})


@pytest.mark.parametrize("key", ["arms", "stages", "flags", "shared_arms", "stages.1"])
@pytest.mark.parametrize("where", ["", "common.yaml, "])
def test_a_key_that_is_left_empty_is_a_fault_of_its_file(key, where, tmp_path):
    empty = {"stages": {1: None}} if key == "stages.1" else {key: None}
    own = {"name": "own", "like": "common.yaml", "shared_arms": list(TINY["arms"]), **({} if where else empty)}
    common = changed(**(empty if where and key != "shared_arms" else {}))
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(common))
    if where and key == "shared_arms":  # which only a study that goes by another may have
        assert list(loaded(tmp_path, own).arms) == list(TINY["arms"])
        return
    with pytest.raises(UmedError, match=f"\n  {where}{key}: found NoneType. Give a"):
        loaded(tmp_path, own)


def test_no_file_to_go_by_and_a_variant_without_arms_are_faults(tmp_path):
    with pytest.raises(UmedError, match="like: found None; give the name of a file"):
        loaded(tmp_path, changed(like=None))
    with pytest.raises(UmedError, match="variants.none.arms: found list"):
        loaded(tmp_path, changed(variants={"plain": {}, "none": {"arms": []}}))


def test_a_row_counts_until_its_own_settings_change(tmp_path):
    cell = Cell(1, 4, "plain", "stage 2")
    plan = loaded(tmp_path, TINY)
    before = study_plan.digest(plan, cell)
    other = changed(arms={**TINY["arms"], "stage 1 continued": {"start": "stage 1", "steps": 3}})
    assert study_plan.digest(loaded(tmp_path, other), cell) == before, "another arm's settings"
    arms = {**TINY["arms"], "stage 1": {**TINY["arms"]["stage 1"], "steps": 3}}
    assert study_plan.digest(loaded(tmp_path, changed(arms=arms)), cell) != before, "its start has changed"
    assert study_plan.digest(plan, Cell(1, 4, "plain", "stage 1 continued")) != study_plan.digest(
        loaded(tmp_path, changed(stages={2: {"umed_num_candidates": 4}})), Cell(1, 4, "plain", "stage 1 continued")
    ), "its time is that of stage 2"


def test_every_row_that_is_committed_counts():
    """A recipe that says something else makes them rows of another one: `study_recipes` says what to do."""
    folder, known = ROOT / "docs" / "results" / "study", set()
    for file in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")):
        plan = study_plan.load_study(file)
        known |= {study_plan.digest(plan, cell) for cell in study_plan.cells(plan, plan.seeds[:1], plan.sizes[:1])}
    rows = [json.loads(file.read_text()) for file in folder.glob("*/seed*.json")]
    assert len(rows) > 200 and {row["settings"] for row in rows} <= known


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """A copy of the folder of studies, from which recipes are read, and a function that has them read again."""

    def read_again() -> None:
        study_recipes.recipe_named.cache_clear()
        study_recipes.content.cache_clear()

    folder = tmp_path / "studies"
    shutil.copytree(ROOT / "benchmarks" / "studies", folder)
    with monkeypatch.context() as patched:
        patched.setattr(study_recipes, "STUDIES", folder)
        read_again()
        yield folder, read_again
    read_again()


def test_a_row_counts_until_a_recipe_changes(studies, tmp_path, monkeypatch):
    folder, read_again = studies
    plan = study_plan.load_study(folder / "hold_out_source.yaml")
    cell, ct = Cell(3, 400, "without MR", "stage 2"), folder / "sources" / "ct.yaml"
    monkeypatch.setattr(study_training, "make_data", lambda folder, data, seed: folder)
    workshop = study_training.Workshop(tmp_path / "out", plan, study_rows.Rows(plan, tmp_path / "rows"))

    def made() -> list:
        read_again()
        base, records = workshop._demo(3).out, workshop.records(3, cell.variant)
        return [study_plan.digest(plan, cell), records.name, base.name, workshop.checkpoint(cell).parents[2].name]

    first, text = made(), ct.read_text()
    ct.write_text(text.replace("description: ", "description: Those of ") + "# a remark\n")
    assert made() == first and first[2] == "seed3"
    ct.write_text(text.replace("nodular opacity", "round opacity"))
    changed = made()
    assert changed[2:] == first[2:] and changed[0] != first[0] and changed[1] != first[1], "a source of the mixture"
    ct.write_text(text)
    assert made() == first
    monkeypatch.setitem(study_recipes.OF_FIRST_ROWS, "demo_studies", "another")
    changed = made()
    assert changed[0] != first[0] and changed[2] == changed[3] != first[2], "each base is trained by the demo's recipe"


def test_a_recipe_without_first_rows_is_in_the_digest(studies, tmp_path):
    folder, read_again = studies
    cell = Cell(1, 4, "plain", "stage 1")
    shutil.copy(folder / "sources" / "ct.yaml", folder / "mine.yaml")
    plan = loaded(tmp_path, changed(data={**TINY["data"], "recipe": "mine.yaml", "generated": True}))
    before = study_plan.digest(plan, cell)
    (folder / "mine.yaml").write_text((folder / "mine.yaml").read_text().replace("window: file", "window: full"))
    assert study_plan.digest(plan, cell) == before, "a study that runs ends with what it began with"
    read_again()
    assert study_plan.digest(plan, cell) != before


def prediction(number: int, values: dict, **groups: str) -> Prediction:
    details = {"true_classes": [], "true_boxes": [], "boxes": [], "set_iou": 0.0, "modality": "", "reading": None}
    return Prediction(
        *(str(number), "a.png", "q", "a", "t", values, f"p{number // 2}"),
        groups={"source": "s", **groups},
        details={**details, "image_aspect_ratio": "pad"},
    )


def with_scores(rows, cell, folder: Path, iou: float, group=lambda number: {}) -> None:
    values = [{"accuracy": 1.0, "mean_iou": iou + n / 100, "vision_relevance": 0.0123} for n in range(11)]
    predictions = [prediction(n, v, **group(n)) for n, v in enumerate([*values, {"accuracy": 0.0}])]
    metrics = {"mean_iou": {"value": 0, "ci95": None, "n": 11}}
    Evaluation("recipe", "c", "t", predictions, metrics).save(folder)
    about = {"settings": rows.digest(cell), "steps": 1, "processor_seconds": 2.0}
    rows.add(cell, about, folder)


@pytest.mark.llava
def test_rows_hold_the_scores_of_each_question_and_the_table_pairs_them(tmp_path):
    plan = loaded(tmp_path, TINY)
    rows = study_rows.Rows(plan, tmp_path / "rows")
    for arm, iou in (("stage 1", 0.1), ("stage 2", 0.3), ("stage 1 continued", 0.2)):
        with_scores(rows, Cell(1, 4, "plain", arm), tmp_path / arm, iou)
    read = study_rows.Rows(plan, tmp_path / "rows").scores(Cell(1, 4, "plain", "stage 2"))
    assert read[3] == Row("3", "p1", {"accuracy": 1.0, "mean_iou": 0.33, "vision_relevance": 0.0123})
    assert read[11] == Row("11", "p5", {"accuracy": 0.0})
    table = study_table.markdown(plan, rows, [1, 2])
    line = next(line for line in table.splitlines() if line.startswith("| stage 2 |"))
    assert "+0.200" in line and "+0.100" in line and line.endswith("| 2 |")
    assert "Not yet made, by number of labelled studies: 4: 3." in table
    (point,) = study_table.points(plan, rows, [1, 2], "plain", "stage 2", "mean_iou")
    assert point["gain"] == pytest.approx(0.1) and point["seeds"] == 1
    assert (
        study_table.draw(plan, rows, [1, 2], tmp_path / "figure.png")
        and (tmp_path / "figure.png").stat().st_size > 9000
    )


@pytest.mark.llava
def test_a_row_of_another_study_counts_where_its_settings_are_equal(tmp_path):
    rows = study_rows.Rows(loaded(tmp_path, TINY), tmp_path / "rows")
    cell = Cell(1, 4, "plain", "stage 2")
    with_scores(rows, cell, tmp_path / "stage 2", 0.3)
    other = study_rows.Rows(loaded(tmp_path, changed(name="other")), tmp_path / "rows")
    assert other.has(cell) and other.scores(cell) == rows.scores(cell) and not other.outdated(cell)
    longer = {**TINY["arms"], "stage 2": {**TINY["arms"]["stage 2"], "steps": 2}}
    third = study_rows.Rows(loaded(tmp_path, changed(name="third", arms=longer)), tmp_path / "rows")
    assert not third.has(cell) and third.scores(cell) is None and not third.outdated(cell)


@pytest.mark.llava
def test_what_was_held_out_has_lines_of_its_own_in_each_variant(tmp_path):
    """Only the variant that holds a class out names the groups. They count for the other variant too."""
    held = {"plain": {}, "without": {"data": {"hold_out": {"classes": ["cyst"]}}}}
    plan = loaded(tmp_path, changed(variants=held))
    rows = study_rows.Rows(plan, tmp_path / "rows")
    with_scores(rows, Cell(1, 4, "plain", "stage 1"), tmp_path / "plain", 0.5)
    table = study_table.markdown(plan, rows, [1])
    assert "| stage 1 | 1 |" in table and "held out" not in table
    group = lambda number: {"training": "held_out" if number < 4 else "seen"}  # noqa: E731
    with_scores(rows, Cell(1, 4, "without", "stage 1"), tmp_path / "without", 0.2, group)
    assert rows.scores(Cell(1, 4, "without", "stage 1"))[4].groups == {"training": "seen"}
    lines = study_table.markdown(plan, rows, [1]).splitlines()
    for line in (
        "| stage 1: held out of training | 1 | 1.000 | 0.515 |",
        "| stage 1: seen in training | 1 | 0.875 | 0.570 |",
        "| stage 1, without: held out of training | 1 | 1.000 | 0.215 |",
        "| stage 1, without | held out of training | 1 | +0.000",
    ):
        assert [found for found in lines if found.startswith(line)], line
    (cost,) = [line for line in lines if line.startswith("| stage 1, without | seen in training |")]
    assert "| -0.300" in cost


def test_a_variant_without_the_control_arm_names_whose_stands_in(tmp_path):
    """Augmentation alone raises IoU, so an augmented stage 2 is compared with an augmented control."""
    few = study_plan.load_study(ROOT / "benchmarks" / "studies" / "few_labels.yaml")
    for variant, control in (("divided", "plain"), ("divided and augmented", "augmented"), ("augmented", "augmented")):
        other = study_plan.compared_with(few, Cell(3, 200, variant, "stage 2"))
        assert other == Cell(3, 200, control, "stage 1 continued")
    of = {"plain": {}, "half": {"arms": ["stage 1"]}, "other": {"arms": ["stage 1"], "control": "half"}}
    with pytest.raises(UmedError, match="'half' has not all arms"):
        loaded(tmp_path, changed(variants=of))
    with pytest.raises(UmedError, match="variants.other.control: unknown variant 'halv'"):
        loaded(tmp_path, changed(variants={**of, "other": {"arms": ["stage 1"], "control": "halv"}}))


def test_folds_and_a_held_out_class_exclude_each_other(tmp_path):
    variants = {"plain": {}, "without": {"data": {"hold_out": {"classes": ["cyst"]}}}}
    with pytest.raises(UmedError, match="folds deals all studies anew"):
        loaded(tmp_path, changed(data={**TINY["data"], "folds": 5}, variants=variants))


@pytest.mark.llava
def test_the_labelled_studies_of_a_mixture_are_of_each_source_and_the_held_out_one_is_in_the_test_alone(tmp_path):
    recipe = {"recipe": "sources/by_modality.yaml", "generated": True, "train": 16, "val": 4, "test": 8}
    counts = {}
    for name, rule in (("all", None), ("without", {"sources": ["mr.yaml"]})):
        data = study_plan.Data(**recipe, hold_out=rule)
        records = load_records(study_data.make_data(tmp_path / name, data, seed=1))
        counts[name] = {
            split: Counter(record["source"] for record in records if record["split"] == split)
            for split in ("train", "val", "test")
        }
        first = [record["source"] for record in records if record["split"] == "train"][:8]
        assert len(set(first)) == (3 if rule is None else 2), "the first are not of one source alone"
    assert counts["all"]["train"] == {"demo_ct": 8, "demo_mr": 4, "demo_xray": 4}
    assert counts["without"]["train"] == {"demo_ct": 8, "demo_xray": 4}
    assert counts["without"]["val"] == {"demo_ct": 2, "demo_xray": 1}
    assert counts["without"]["test"] == counts["all"]["test"] == {"demo_ct": 4, "demo_mr": 2, "demo_xray": 2}


def test_a_size_that_no_table_shows_is_refused(tmp_path):
    plan = loaded(tmp_path, TINY)
    options = SimpleNamespace(only=None, variants=None, seeds=None, sizes="4,5")
    with pytest.raises(UmedError, match="--sizes 5: tiny has 4"):
        study.chosen_cells(plan, options)


def test_an_arm_that_no_chosen_variant_has_is_refused(tmp_path):
    plan = loaded(tmp_path, changed(variants={"plain": {}, "half": {"arms": ["stage 1"]}}))

    def chosen(variants, only, seeds=None):
        return study.chosen_cells(plan, SimpleNamespace(only=only, variants=variants, seeds=seeds, sizes=None))

    told = (
        "--only 'stage 2': no variant that is asked for has this arm. half has 'stage 1'. Variants that have it: plain."
    )
    for only in (["stage 2"], ["stage 1", "stage 2"]):
        with pytest.raises(UsageError) as error:
            chosen("half", only)
        assert str(error.value) == told
    assert [cell.variant for cell in chosen("plain,half", ["stage 2"])] == ["plain"]
    with pytest.raises(UsageError, match="'1,a': needed are whole numbers"):
        chosen(None, None, seeds="1,a")


def test_every_key_of_a_variants_data_has_its_own_folder(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study_training, "make_data", lambda folder, data, seed: made.append((folder.name, data)))
    variants = {"plain": {}, "noisy": {"data": {"box_noise": 0.1}}, "fewer": {"data": {"train": 6}}}
    variants["folds"] = {"data": {"folds": 3}}
    plan = loaded(tmp_path, changed(variants=variants))
    workshop = study_training.Workshop(tmp_path / "out", plan, study_rows.Rows(plan, tmp_path / "rows"))
    for variant in variants:
        workshop.records(1, variant)
    names = dict(zip(variants, [name for name, _ in made]))
    assert names["plain"] == names["noisy"] == "data", "noise comes with the labelled file"
    assert len(set(names.values())) == 3 and made[2][1].train == 6 and made[3][1].folds == 3


def test_equal_time_goes_by_what_steps_took_right_after_the_budget(tmp_path, monkeypatch):
    """A slower hour of the machine lengthens both sides. A row of an earlier version has no start: it is measured."""
    plan = loaded(tmp_path, TINY)
    workshop = study_training.Workshop(tmp_path / "out", plan, study_rows.Rows(plan, tmp_path / "rows"))
    control = Cell(1, 4, "plain", "stage 1 continued")
    about = {"processor_seconds": 200.0, "reference_step": 0.5, "reference_start": 10.0}
    monkeypatch.setattr(workshop.rows, "read", lambda cell: about)
    paces = iter([1.0, 1.0, 1.5, 1.7, 1.0, 0.25])
    monkeypatch.setattr(workshop, "_measure_pace", lambda *unused: {"start": 5.0, "step": next(paces)})
    flags = study_plan.flags_of(plan, "plain", "stage 1 continued")
    assert workshop._equal_steps(control, flags, 0.0) == 380
    assert workshop._equal_steps(control, flags, 80.0) == 300, "80 s at twice the time a step are 40 s there"
    slower = {**flags, "umed_attention_loss": 0.3}
    workshop.work.mkdir(parents=True)
    assert workshop._equal_steps(control, slower, 0.0) == round(190 / (0.5 * 1.6))
    assert workshop._equal_steps(control, slower, 0.0) == round(190 / (0.5 * 1.6)), "measured once"
    del about["reference_start"]
    assert workshop._equal_steps(control, flags, 0.0) == 380, "5 s at half the time a step are 10 s there"
    del about["reference_step"]
    with pytest.raises(UmedError, match="lacks reference_step"):
        workshop._equal_steps(control, flags, 0.0)


def test_noise_moves_boxes_and_what_the_answer_says():
    record = {
        "id": "a",
        "image_size": [100, 100],
        "objects": {"ref": ["cyst"], "bbox": [[20, 20, 60, 40]], "bbox_type": "real"},
        "terms": {"cyst": ["cyst"]},
        "provenance": {"image_aspect_ratio": "pad"},
        "conversations": [],
    }
    noisy = study_data.with_noise(record, 0.2, seed=0)
    (box,) = noisy["objects"]["bbox"]
    assert all(0 < abs(a - b) <= limit for a, b, limit in zip(box, (20, 20, 60, 40), (8, 4, 8, 4)))
    assert f"[{box[0] / 100:.2f}, {box[1] / 100:.2f}" in noisy["conversations"][1]["value"]
    assert study_data.with_noise(record, 0.0, seed=0) is record
    fine = {**record, "provenance": {**record["provenance"], "box_decimals": 3}}
    said = study_data.with_noise(fine, 0.2, seed=0)["conversations"][1]["value"]
    assert f"[{box[0] / 100:.3f}, {box[1] / 100:.3f}" in said


def test_patients_stay_in_one_fold():
    records = [{"id": str(n), "source": "s", "patient": str(n // 3), "split": "train"} for n in range(90)]
    tested = []
    for fold in range(5):
        dealt = study_data.in_folds(records, 5, fold)
        by_patient = {}
        for record in dealt:
            by_patient.setdefault(record["patient"], set()).add(record["split"])
        assert all(len(splits) == 1 for splits in by_patient.values())
        tested += [record["id"] for record in dealt if record["split"] == "test"]
    assert sorted(tested) == sorted(record["id"] for record in records)


def test_the_best_answer_has_the_true_classes_and_the_best_box():
    record = {
        "image_size": [100, 100],
        "objects": {"ref": ["cyst"], "bbox": [[20, 20, 60, 40]]},
        "terms": {"cyst": ["cyst"], "nodule": ["nodule"]},
        "provenance": {"image_aspect_ratio": "pad"},
        "conversations": [{"value": "?"}, {"from": "gpt", "value": "reference"}],
    }
    texts = [
        "nodule at [0.20, 0.20, 0.60, 0.40]",
        "cyst at [0.20, 0.20, 0.60, 0.30]",
        "cyst at [0.20, 0.20, 0.60, 0.41]",
    ]
    assert study_sampling.best_of(record, texts)["conversations"][1]["value"] == texts[2]
    assert study_sampling.best_of(record, texts[:1]) is None


@pytest.mark.run
@pytest.mark.llava
def test_the_shapes_of_a_studys_boxes(tmp_path, capsys):
    """Malformed boxes count and have no area. The constant box is the median of the training boxes."""
    seed = tmp_path / "work" / "seed1"
    evaluation = seed / "checkpoints" / "seed1-4-plain-stage_2" / "evaluation"
    evaluation.mkdir(parents=True)
    answers = ["At [0.0, 0.0, 0.5, 0.5].", "At [0.5, 0.5, 0.2, 0.9] and [0.0, 0.0, 0.5, 1.0].", "No finding.", "None."]
    (evaluation / "predictions.jsonl").write_text("".join(json.dumps({"answer": text}) + "\n" for text in answers))
    for name, box in (("data", [0, 0, 1, 1]), ("data-1", [0, 0, 32, 24])):
        records = json.loads(grounded_records(seed / name).read_text())
        for number, record in enumerate(records):
            record["split"] = ("train", "test", "val")[number % 3]
            record["objects"] |= {"ref": ["nodule"], "bbox": [box]}
            record["answer_type"] = "grounded"
        (seed / name / "records.json").write_text(json.dumps(records))
    box_shapes.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| 4-plain-stage_2 | 4 | 0.50 | 0.25 | 0.38 |" in printed
    assert "one constant box: mean IoU 1.000 on 3 held-out studies" in printed


def test_a_study_from_end_to_end(tmp_path, monkeypatch):
    """Stage 1 ends by validation, the others have the same time, and a second start trains nothing but what is missing."""
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    trained = []

    def measured(command, log, cwd):
        words = [str(word) for word in command]
        done = run_command(words, env=study_training.environment(), cwd=cwd)
        assert done.returncode == 0, done.stderr[-3000:]
        flags = dict(zip(words, words[1:]))
        trained.append(flags.get("--output_dir"))
        return 4.4

    monkeypatch.setattr(study_training, "measured", measured)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(TINY))
    arguments = [str(file), str(tmp_path / "out"), "--rows", str(tmp_path / "rows")]
    monkeypatch.setattr(study_training.Workshop, "_measure_pace", lambda *unused: {"start": 3.0, "step": 0.7})
    study.main([*arguments, "--only", "stage 1 continued"])
    row = json.loads((tmp_path / "rows" / "tiny" / "seed1-4-plain-stage_1_continued.json").read_text())
    assert row["steps"] == 2, "(4.4 - 3) / 0.7"
    assert "reference_step" not in row, "only the budget needs it"
    assert row["scores"]["accuracy"].count(" ") == 3
    names = [Path(folder).parent.name for folder in trained if folder]
    assert len(names) == 3, "stage 1, stage 2 for its time, and the arm itself"
    study.main(arguments)
    assert len([folder for folder in trained if folder]) == 3, "the rest only had to be evaluated"
    before = len(trained)
    study.main(arguments)
    assert len(trained) == before
    assert "All cells are finished." in (tmp_path / "out" / "table.md").read_text()
    budget = json.loads((tmp_path / "rows" / "tiny" / "seed1-4-plain-stage_2.json").read_text())
    assert (budget["reference_start"], budget["reference_step"]) == (3.0, 0.7)
    # Another checkout has the rows alone: nothing is trained there.
    study.main([str(file), str(tmp_path / "other"), "--rows", str(tmp_path / "rows")])
    assert len(trained) == before
