"""Reports: R2Gen's JSON and a CSV, one image or all of a study, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umed_plugin import cli
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.augmentation.study import augmented_study
from umed_plugin.data.build import build_records
from umed_plugin.data.data_stamp import data_stamp
from umed_plugin.data.images import open_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import is_diagnosed, load_records, record_faults, save_records
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
HEAD = """
name: texts
description: Drawn studies with reports.
terms: {licence: CC0, url: "https://example.org"}
classes: {effusion: {name: pleural effusion, synonyms: [effusion]}, nodule: {name: nodule}}
"""


def write(folder: Path, options: str = "", studies: dict | None = None, split: str = "{by: column}") -> Path:
    for place, size in {"s1/0.png": (60, 80), "s1/1.png": (40, 40), "s2/0.png": (50, 50)}.items():
        (folder / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 100 + size[0]).save(folder / "images" / place)
    studies = studies or {
        "train": [study("s1", "Small effusion.  XXXX  heart is normal,\nno nodule.", ["s1/0.png", "s1/1.png"])],
        "val": [],
        "test": [study("s2", "The lungs are clear.", ["s2/0.png"])],
    }
    (folder / "annotation.json").write_text(json.dumps(studies))
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"{HEAD}annotations: {{reader: reports, files: annotation.json, image_root: images{options}}}\nsplit: {split}\n"
    )
    return recipe


def study(name: str, report: object, images: object) -> dict:
    return {"id": name, "report": report, "image_path": images, "split": "train", "subject_id": f"of {name}"}


def built(folder: Path, recipe: Path, **settings: object) -> list[dict]:
    return build_records(load_recipe(recipe), out_dir=folder / "out", data_root=folder, **settings)


@pytest.mark.llava
def test_r2gens_file_gives_texts_with_the_findings_that_they_name(tmp_path, capsys):
    first, second = built(tmp_path, write(tmp_path))
    assert first["conversations"][1]["value"] == "Small effusion. XXXX heart is normal, no nodule."
    assert (first["answer_type"], first["split"], first["patient"]) == ("report", "train", "of s1")
    assert first["objects"] == {"ref": ["pleural effusion"], "bbox": [], "bbox_type": "real"}
    assert second["objects"]["ref"] == [] and second["split"] == "test"
    assert first["image"].endswith("images/s1/0.png")
    assert "1 images left out (further views of a study; annotations.views)" in capsys.readouterr().err
    assert not any(record_faults(record) or is_diagnosed(record) for record in (first, second))
    save_records([first, second], tmp_path / "r.json")
    assert load_records(tmp_path / "r.json", split="test") == [second]
    boxed = {**first, "objects": {**first["objects"], "bbox": [[0, 0, 9, 9]]}}
    assert "same length" in record_faults(boxed)[0]


@pytest.mark.llava
def test_a_montage_shows_all_images_of_a_study_side_by_side_at_the_lowest_height(tmp_path):
    recipe = write(tmp_path, ", views: montage, taken_out: remove")
    record = built(tmp_path, recipe)[0]
    assert record["conversations"][1]["value"] == "Small effusion. heart is normal, no nodule."
    picture = np.asarray(Image.open(tmp_path / "out" / record["image"]))
    assert picture.shape == (40, 70, 3) and record["image_size"] == [70, 40]
    assert set(picture[:, :30].ravel()) == {160} and set(picture[:, 30:].ravel()) == {140}
    # Read in place, as with an image cache, it is the same picture.
    in_place = built(tmp_path, recipe, render=False)[0]
    assert np.array_equal(np.asarray(open_image(in_place["image"], in_place["reading"])), picture)
    # A second build sees that the second view has changed.
    Image.new("L", (40, 40), 7).save(tmp_path / "images/s1/1.png")
    again = built(tmp_path, recipe)[0]
    assert set(np.asarray(Image.open(tmp_path / "out" / again["image"]))[:, 30:].ravel()) == {7}


@pytest.mark.llava
def test_the_stamp_of_the_data_changes_with_a_further_view(tmp_path):
    recipe = load_recipe(write(tmp_path, ", views: montage"))
    before = data_stamp(read_annotations(recipe, tmp_path))
    view = tmp_path / "images/s1/1.png"
    view.write_bytes(view.read_bytes() + b" ")
    assert data_stamp(read_annotations(recipe, tmp_path)) != before


@pytest.mark.llava
def test_a_view_that_is_missing_is_named_and_the_first_is_not(tmp_path, capsys):
    recipe = write(tmp_path, ", views: montage")
    (tmp_path / "images/s1/1.png").rename(tmp_path / "images/s1/1.PNG")
    with pytest.raises(UmedError) as caught:
        built(tmp_path, recipe)
    assert f"{tmp_path}/images/s1/1.png: no such image, but" in str(caught.value)
    assert "Did you mean 'images/s1/1.PNG'?" in str(caught.value) and "s1/0.png" not in str(caught.value)
    assert cli.main(["recipe", "check", str(recipe), "--data-root", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert f"{tmp_path}/images/s1/1.png Did you mean" in shown and "s1/0.png" not in shown


@pytest.mark.llava
def test_a_csv_has_views_by_study(tmp_path):
    write(tmp_path)
    (tmp_path / "t.csv").write_text(
        "study,image,report,who\n1,s1/0.png,A nodule.,p\n1,s1/1.png,A nodule.,p\n2,s2/0.png,Clear.,q\n"
    )
    options = (
        "{reader: reports, files: t.csv, image_root: images, views: montage, columns: {study: study, patient: who}}"
    )
    recipe = tmp_path / "c.yaml"
    recipe.write_text(f"{HEAD}annotations: {options}\nsplit: {{by: patient, fractions: {{train: 1}}}}\n")
    first, second = built(tmp_path, recipe)
    assert (first["patient"], first["image_size"], first["objects"]["ref"]) == ("p", [70, 40], ["nodule"])
    assert second["image_size"] == [50, 50]
    (tmp_path / "t.csv").write_text("study,image,report,who\n1,s1/0.png,A nodule.,p\n1,s1/1.png,None.,p\n1,,x,p\n")
    with pytest.raises(
        UmedError, match=r"(?s)t.csv:3: gives study '1' another report.*t.csv:4: column 'image' is empty"
    ):
        built(tmp_path, recipe)
    (tmp_path / "t.csv").write_text(
        "study,image,report,who\n1,s1/0.png,A nodule, small.,p\n2,s2/0.png,None.,p\n3,s2/0.png"
    )
    with pytest.raises(UmedError, match=r"(?s)t.csv:2: has 5 cells.*Put text that holds ','.*t.csv:4: has 2 cells"):
        built(tmp_path, recipe)
    (tmp_path / "t.csv").write_text("study,image,report,who\n1,s1/0.png,A nodule.,p\n2,s2/0.png,None.\n3,s2/0.png\n")
    assert next(each["patient"] for each in built(tmp_path, recipe)) == "p", "Excel leaves out empty cells"


@pytest.mark.llava
@pytest.mark.parametrize(
    ("studies", "words"),
    [
        ({"train": [study("s1", 7, ["s1/0.png"]), study("s2", "Clear.", [])]}, r"(?s)train\[0\].*'report'.*train\[1\]"),
        ({"images": []}, "has no list train, val or test; it holds images. Is it R2Gen's"),
        (
            {"train": [study("s1", "Clear.", ["s1/0.png"]), study("s1", "A nodule.", ["s1/0.png"])]},
            "is about 0.png again.*another report",
        ),
        ({"train": [study("s1", "Clear.", ["s1/0.pgn"])]}, "no such image.*Did you mean 'images/s1/0.png'"),
    ],
)
def test_what_cannot_be_a_report_is_named(studies, words, tmp_path):
    with pytest.raises(UmedError, match=words):
        built(tmp_path, write(tmp_path, studies=studies))


def splits(folder: Path, recipe: Path) -> list[str]:
    found = read_annotations(load_recipe(recipe), folder)
    assert found.faults.messages == []
    return [item.split for item in found.items]


def fault(folder: Path, recipe: Path) -> str:
    (message,) = read_annotations(load_recipe(recipe), folder).faults.messages
    return message


ONE, TWO = study("s1", "A nodule.", ["s1/0.png"]), study("s2", "Clear.", ["s2/0.png"])


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_the_names_of_the_validation_split(name, tmp_path):
    studies = {"train": [ONE], name: [TWO], "test": [study("s3", "Clear.", ["s1/1.png"])]}
    assert splits(tmp_path, write(tmp_path, studies=studies)) == ["train", "val", "test"]
    (tmp_path / "t.csv").write_text(f"image,report,in\ns1/0.png,A nodule.,train\ns2/0.png,Clear.,{name}\n")
    recipe = write(tmp_path, ", columns: {split: in}")
    recipe.write_text(recipe.read_text().replace("annotation.json", "t.csv"))
    assert splits(tmp_path, recipe) == ["train", "val"]


@pytest.mark.parametrize(
    ("studies", "words"),
    [
        ({"train": [ONE], "dev": [TWO]}, "holds 'dev', which would not be read. Needed: lists of studies"),
        ({"train": [ONE], "val": {"s2": TWO}}, "holds 'val', which would not be read"),
        ([ONE], "holds a list; needed: lists train, val or test"),
    ],
)
def test_studies_that_no_split_names_are_a_fault(studies, words, tmp_path):
    assert words in fault(tmp_path, write(tmp_path, studies=studies))
    assert splits(tmp_path, write(tmp_path, studies={"train": [ONE], "val": None, "info": ["made up"]})) == ["train"]


def test_a_file_that_names_another_split_than_the_recipe_is_a_fault(tmp_path):
    recipe = write(tmp_path, studies={"train": [ONE], "val": [TWO], "test": []}, split="{by: file}")
    recipe.write_text(recipe.read_text().replace("files: annotation.json", "files: {train: annotation.json}"))
    words = (
        "is read as train by annotations.files, and holds 1 studies of val. To keep its splits, give the file without"
    )
    assert words in fault(tmp_path, recipe)
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [ONE, TWO], "val": [], "test": []}))
    assert splits(tmp_path, recipe) == ["train", "train"]


@pytest.mark.parametrize("name", ["r.csv", "R.CSV"])
def test_a_table_without_a_column_of_splits_names_none(name, tmp_path):
    recipe = write(tmp_path)
    recipe.write_text(recipe.read_text().replace("annotation.json", name))
    with pytest.raises(UmedError, match=r"split.by: is 'column', but annotations.columns.split names none"):
        load_recipe(recipe)


@pytest.mark.llava
def test_an_empty_report_is_counted_and_a_report_is_never_moved(tmp_path, capsys):
    recipe = write(
        tmp_path, studies={"train": [study("s1", " . ", ["s1/0.png"]), study("s2", "A nodule.", ["s2/0.png"])]}
    )
    (record,) = built(tmp_path, recipe)
    assert "1 studies left out (their report is empty)" in capsys.readouterr().err
    record["augment"] = {"flips": ["left_right"], "rotation": 20, "zoom": [0.5, 2], "share": 1}
    moves = {augmented_study(record, 0, epoch).move for epoch in range(8)}
    assert len(moves) == 1 and not next(iter(moves)).mirrors and not next(iter(moves)).resamples


@pytest.mark.llava
def test_the_shipped_recipes_read_r2gens_files(tmp_path):
    write(tmp_path, studies={"train": [study("CXR9_IM-1", "Mild edema.", ["s1/0.png"])], "val": [], "test": []})
    (tmp_path / "images" / "CXR9_IM-1").symlink_to(tmp_path / "images" / "s1")
    content = json.loads((tmp_path / "annotation.json").read_text())
    content["train"][0]["image_path"] = ["CXR9_IM-1/0.png", "CXR9_IM-1/1.png"]
    del content["train"][0]["subject_id"]
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    (record,) = build_records(load_recipe("iu_xray_reports"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert record["patient"] == "CXR9" and record["objects"]["ref"] == ["pulmonary edema"]
    content["train"][0]["subject_id"] = "10000032"
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    (record,) = build_records(load_recipe("mimic_cxr_reports"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert record["patient"] == "10000032"


@pytest.mark.llava
def test_check_and_build_count_reports(tmp_path, capsys):
    recipe, page = write(tmp_path), tmp_path / "page"
    common = [str(recipe), "--data-root", str(tmp_path)]
    assert cli.main(["recipe", "check", *common, "--report", str(page)]) == 0
    assert any(page.rglob("*.html"))
    assert cli.main(["recipe", "build", *common, "--out", str(tmp_path / "built" / "r.json")]) == 0
    assert "2 records, 0 with lesions, 0 without, 2 reports" in capsys.readouterr().out


def test_a_patient_of_number_0_is_a_patient(tmp_path):
    """Empty, each of the images would be a patient of its own."""
    studies = [{**study(name, "Small effusion.", [f"{name}/0.png"]), "subject_id": 0} for name in ("s1", "s2")]
    found = read_annotations(load_recipe(write(tmp_path, studies={"train": studies, "val": [], "test": []})), tmp_path)
    assert [item.patient for item in found.items] == ["0", "0"]


def test_a_table_without_titles_loses_no_study(tmp_path):
    recipe = write(tmp_path, ", columns: {file: 0, report: 1}", split="{by: patient, fractions: {train: 1}}")
    (tmp_path / "r.csv").write_text("s1/0.png,Small effusion.\ns2/0.png,The lungs are clear.\n")
    recipe.write_text(recipe.read_text().replace("annotation.json", "r.csv"))
    (fault,) = read_annotations(load_recipe(recipe), tmp_path).faults.messages
    assert "'s1/0.png' in column 0 (annotations.columns.file)" in fault and "annotations.header: false" in fault
    recipe.write_text(recipe.read_text().replace("columns:", "header: false, columns:"))
    assert [item.report for item in read_annotations(load_recipe(recipe), tmp_path).items] == [
        "Small effusion.",
        "The lungs are clear.",
    ]


def test_a_report_that_names_a_held_out_class_is_left_out_of_training(tmp_path):
    """It has no boxes and no labels: its words alone say what it shows."""
    studies = {
        "train": [
            study("s1", "Small effusion.", ["s1/0.png"]),
            study("s3", "No effusion. A nodule is seen.", ["s1/1.png"]),
        ],
        "test": [study("s2", "A pleural effusion is seen.", ["s2/0.png"])],
    }
    recipe = write(tmp_path, studies=studies)
    recipe.write_text(recipe.read_text() + "hold_out: {classes: [pleural effusion]}\n")
    found = read_annotations(load_recipe(recipe), tmp_path)
    assert [(item.split, item.report, item.held_out) for item in found.items] == [
        ("train", "No effusion. A nodule is seen.", False),
        ("test", "A pleural effusion is seen.", True),
    ]
    assert not found.faults.messages and found.left_out == {"held out of train: pleural effusion": 1}
    (remark,) = [line for line in found.faults.remarks if line.startswith("hold_out")]
    assert "1 reports or phrases of train and val say that 'pleural effusion' is absent" in remark
