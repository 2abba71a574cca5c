"""Builds with pseudo-boxes on drawn images and a small random tower: records, faults, what is kept, resuming, evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.drawn import write_recipe

from umed_plugin.cli import main
from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.items import ItemsCheck
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import Record, load_records
from umed_plugin.errors import UmedError
from umed_plugin.evaluation.benchmarks.recipe import recipe_benchmark, record_questions
from umed_plugin.pseudo_boxes import PseudoBoxes, finder, map_training
from umed_plugin.pseudo_boxes.finder import FOLDER

pytestmark = pytest.mark.llava
CSV = (
    "{reader: csv, files: labels.csv, image_root: images, no_finding: [''], "
    "columns: {file: file, lesion: label, patient: patient, modality: modality}}"
)
SPLIT = "{by: patient, fractions: {train: 1}}"
RULE = "pseudo_boxes: {shots: 5, steps: 12, least_score: 0.0}\n"


def build(studies: Path, tower: Path, out: Path, extra: str = RULE, **more: Any) -> list[Record]:
    recipe = load_recipe(write_recipe(studies, CSV, SPLIT, extra))
    return build_records(recipe, out_dir=out, find_boxes=PseudoBoxes(tower, out), **more)


def test_a_label_gets_a_box_that_says_who_drew_it(studies: Path, tower: Path, tmp_path: Path) -> None:
    recipe = write_recipe(studies, CSV, SPLIT, RULE)
    out = tmp_path / "built" / "train.json"
    command = ["recipe", "build", str(recipe), "--out", str(out), "--tower", str(tower), "--quiet"]
    assert main(command) == 0
    records = load_records(out)
    pseudo = [record for record in records if record["provenance"].get("boxes") == "pseudo"]
    assert len(records) == 20 and len(pseudo) == 8
    for record in pseudo:
        ((x1, y1, x2, y2),) = record["objects"]["bbox"]
        assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 48
        assert record["objects"]["ref"] == ["nodule"] and record["answer_type"] == "grounded"
        assert 0.1 < record["provenance"]["box_score"] < 0.9
        assert "[" in record["conversations"][1]["value"]
    others = [record for record in records if record not in pseudo]
    assert all(record["objects"]["bbox"] == [] and "boxes" not in record["provenance"] for record in others)
    assert (out.parent / "train.pseudo_boxes.png").is_file()
    assert len(list((out.parent / FOLDER).glob("map-*.pt"))) == 2, "one for each modality"
    content = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == content


@pytest.mark.one_stack
def test_hidden_boxes_are_not_looked_at(studies: Path, tower: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(studies, CSV, SPLIT, RULE))
    built = []
    for corners in (",,,,", ",1,2,9,9", ",30,20,60,40"):
        rows = (studies / "labels.csv").read_text().splitlines()
        rows = [rows[0], *(",".join(row.split(",")[:4]) + corners for row in rows[1:])]
        (studies / "labels.csv").write_text("\n".join(rows) + "\n")
        out = tmp_path / corners.strip(",").replace(",", "_")
        assert main(["recipe", "build", recipe, "--out", str(out / "r.json"), "--tower", str(tower), "--quiet"]) == 0
        built.append((out / "r.json").read_bytes())
    assert built[0] == built[1] == built[2]


def test_a_killed_build_goes_on_and_ends_with_the_same_boxes(
    studies: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(studies, tower, tmp_path / "whole")
    monkeypatch.setattr(map_training, "SAVE_EVERY", 5)
    step, steps = map_training._step, []

    def killed(*args: Any) -> None:
        if len(steps) == 8:
            raise KeyboardInterrupt
        steps.append(args[-1])
        step(*args)

    monkeypatch.setattr(map_training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        build(studies, tower, tmp_path / "part")
    monkeypatch.setattr(map_training, "_step", lambda *args: (steps.append(args[-1]), step(*args)))
    monkeypatch.setattr(finder, "_BATCH", 3)
    assert build(studies, tower, tmp_path / "part") == whole
    assert steps == [*range(8), *range(5, 12), *range(12)], "from the state after 5 steps; then the other modality"
    count = len(steps)
    assert build(studies, tower, tmp_path / "part") == whole
    assert len(steps) == count, "nothing is trained again"
    (damaged, _) = sorted((tmp_path / "part" / FOLDER).glob("map-*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert build(studies, tower, tmp_path / "part") == whole
    assert len(steps) == count + 12


@pytest.mark.one_stack
def test_boxes_are_kept_for_the_next_build_and_damaged_lines_found_again(
    studies: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(studies, tower, tmp_path / "out")
    looked: list[int] = []
    of = map_training.TrainedMap.of
    monkeypatch.setattr(
        map_training.TrainedMap, "of", lambda self, pictures: (looked.append(len(pictures)), of(self, pictures))[1]
    )
    assert build(studies, tower, tmp_path / "out") == whole
    assert looked == []
    for file in (tmp_path / "out" / FOLDER).glob("boxes-*.jsonl"):
        lines = file.read_text().split("\n")
        file.write_text("\n".join([*lines[:-3], lines[-2][:20]]))
    assert build(studies, tower, tmp_path / "out") == whole
    assert sum(looked) == 2
    other = build(studies, tower, tmp_path / "out", RULE.replace("}", ", peak_share: 0.2}"))
    assert other != whole, "a rule for boxes that has changed is not answered from what is kept"


@pytest.mark.one_stack
def test_what_the_map_depends_on_trains_another(studies: Path, tower: Path, tmp_path: Path) -> None:
    def maps() -> int:
        return len(list((tmp_path / "out" / FOLDER).glob("map-*.pt")))

    build(studies, tower, tmp_path / "out")
    assert maps() == 2
    build(studies, tower, tmp_path / "out", RULE.replace("}", ", seed: 1}"))
    assert maps() == 4
    build(studies, tower, tmp_path / "out", image_aspect_ratio="square")
    assert maps() == 6


@pytest.mark.one_stack
def test_other_splits_get_the_same_boxes_alone(studies: Path, tower: Path, tmp_path: Path) -> None:
    split = "{by: patient, fractions: {train: 0.8, test: 0.2}}"
    recipe = load_recipe(write_recipe(studies, CSV, split, RULE.replace("5", "4")))
    both = build_records(recipe, out_dir=tmp_path / "a", find_boxes=PseudoBoxes(tower, tmp_path / "a"))
    alone = build_records(recipe, out_dir=tmp_path / "b", find_boxes=PseudoBoxes(tower, tmp_path / "b"), split="test")
    assert alone and alone == [record for record in both if record["split"] == "test"]


def fault(studies: Path, tower: Path, out: Path, extra: str = RULE) -> str:
    with pytest.raises(UmedError) as error:
        build(studies, tower, out, extra)
    return str(error.value)


def rows_of(studies: Path) -> list[str]:
    return (studies / "labels.csv").read_text().splitlines()


@pytest.mark.one_stack
def test_too_few_normal_images_are_a_fault_for_each_modality(studies: Path, tower: Path, tmp_path: Path) -> None:
    rows = [row for row in rows_of(studies) if not row.startswith(("CT_0", "CT_1", "CT_2"))]
    (studies / "labels.csv").write_text("\n".join(rows) + "\n")
    told = fault(studies, tower, tmp_path / "out")
    assert "modality 'CT': 4 images have a label and no box, and the train split has 3 without a lesion" in told
    assert "X-ray" not in told
    assert not (tmp_path / "out" / FOLDER).exists(), "nothing is trained before"
    (checked,) = check_recipe(load_recipe(studies / "recipe.yaml")).faults
    assert checked in told, "`umed recipe check` says it too, without a tower"
    rule = "pseudo_boxes: {normal: '^images/X', steps: 1}\n"
    assert "modality 'CT': 4 images" in fault(studies, tower, tmp_path / "out", rule)


@pytest.mark.one_stack
def test_normal_images_of_one_patient_are_a_fault(studies: Path, tower: Path, tmp_path: Path) -> None:
    rows = [
        ",".join([*row.split(",")[:2], "P1", *row.split(",")[3:]]) if ",," in row else row for row in rows_of(studies)
    ]
    rows = [row.replace(",nod,P1,", f",nod,P{n},") for n, row in enumerate(rows)]
    (studies / "labels.csv").write_text("\n".join(rows) + "\n")
    told = fault(studies, tower, tmp_path / "out")
    assert "all 5 normal images are of one patient ('P1')" in told
    checked = check_recipe(load_recipe(studies / "recipe.yaml")).faults
    assert checked and all(said in told for said in checked)


@pytest.mark.one_stack
def test_images_below_the_score_and_with_several_labels_are_left_out_and_counted(
    studies: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(studies)
    first = next(n for n, row in enumerate(rows) if ",nod," in row)
    rows.append(rows[first].replace(",nod,", ",cy,"))
    (studies / "labels.csv").write_text("\n".join(rows) + "\n")
    records = build(studies, tower, tmp_path / "out", "pseudo_boxes: {shots: 5, steps: 2, least_score: 1.0}\n")
    assert len(records) == 12 and not any(record["objects"]["bbox"] for record in records)
    told = capsys.readouterr().err
    assert "1 images left out (several labels, and one pseudo-box cannot say which it is of)" in told
    assert "7 images left out (no peak of the anomaly map above least_score 1.000)" in told
    assert "3 of 3 images with a lesion of modality CT have no peak above least_score 1.000" in told


def test_the_tower_of_a_checkpoint_is_taken_and_others_are_refused(
    studies: Path, tiny_mistral: Path, tower: Path, tmp_path: Path
) -> None:
    from umed_plugin.pseudo_boxes.tower import PatchTower

    found = PatchTower(tiny_mistral)
    assert (found.side, found.depths) == (64, [1, 2, 2])
    assert PatchTower(tower).depths == [2, 3, 4]
    assert PatchTower(tower).digest != found.digest
    for name, config, words in (
        ("none", None, "a folder without config.json"),
        ("bert", {"model_type": "bert"}, "config.json has model_type 'bert'. Needed: a LLaVA checkpoint"),
    ):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(UmedError, match=words):
            PatchTower(tmp_path / name)
    shutil.copytree(tower, tmp_path / "hollow")
    for file in (tmp_path / "hollow").glob("*model*"):
        file.unlink()
    with pytest.raises(UmedError, match="contains no weights"):
        PatchTower(tmp_path / "hollow")


@pytest.mark.one_stack
def test_evaluation_refuses_boxes_that_no_person_drew(studies: Path, tower: Path, tmp_path: Path) -> None:
    records = build(studies, tower, tmp_path / "out")
    with pytest.raises(UmedError, match="8 of 20 records, the first .* against boxes that no person drew"):
        record_questions(records)
    assert len(record_questions(records, pseudo_boxes=True)) == 20
    recipe = str(studies / "recipe.yaml")
    with pytest.raises(
        UmedError, match="has pseudo_boxes, so its studies would be measured against boxes that no person"
    ):
        recipe_benchmark(recipe).questions(studies, "train", tmp_path)
    check = ItemsCheck("x.json")
    for record in records:
        check.add(record)
    (line,) = check.finish()
    assert line.startswith("8 of 20 items") and "have pseudo-boxes, which an anomaly map drew and no person" in line
