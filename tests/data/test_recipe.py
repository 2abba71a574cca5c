"""Recipes: the shipped ones are right, and mistakes are told all at once with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.drawn import write_recipe

from umed_plugin.data.annotations.coco import CocoOptions
from umed_plugin.data.annotations.table_options import CsvOptions
from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes, sources_of
from umed_plugin.errors import UmedError, UsageError

CSV = "{reader: csv, files: a.csv, columns: {file: f, box: [a, b, c, d], lesion: l}}"


def faults_of(path: Path) -> list[str]:
    with pytest.raises(UmedError) as caught:
        load_recipe(path)
    return str(caught.value).splitlines()


def test_the_expected_recipes_are_shipped() -> None:
    assert set(shipped_recipes()) == {
        *("brain_tumor_coco", "deeplesion", "deeplesion_liver", "demo_studies", "kidney_stone", "kvasir_seg"),
        *("iu_xray_reports", "kvasir_seg_masks", "kvasir_v2", "mau", "mau_labels", "mimic_cxr_reports", "ms_cxr"),
        *("nih_cxr14", "nih_cxr14_labels", "tbx11k", "vindr_cxr"),
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_name_their_terms(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    for source in sources_of(recipe):
        assert source.terms.licence
        assert source.terms.url
    assert all(names[0] == key for key, names in recipe.names.items())
    assert len(recipe.sha256) == 64


def test_a_plain_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, CSV))
    assert recipe.names == {"nodule": ["nodule", "nodular opacity"], "cyst": ["cyst"]}
    assert isinstance(recipe.annotations, CsvOptions)
    assert recipe.annotations.files == {"": "a.csv"}
    assert recipe.root() == tmp_path
    assert recipe.root(tmp_path.parent) == tmp_path.parent


def test_files_per_split(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "{reader: coco, files: {train: a.json, val: b.json}}", "{by: file}"))
    assert isinstance(recipe.annotations, CocoOptions)
    assert recipe.annotations.files == {"train": "a.json", "val": "b.json"}


def test_classes_with_the_same_plain_name_are_one(tmp_path: Path) -> None:
    extra = "ignore_classes: [7]\n"
    path = write_recipe(tmp_path, CSV, extra=extra)
    path.write_text(
        path.read_text().replace("cy: {name: cyst}", "8: {name: nodule, synonyms: [spot, nodular opacity]}")
    )
    recipe = load_recipe(path)
    assert recipe.names == {"nodule": ["nodule", "nodular opacity", "spot"]}
    assert recipe.classes["8"].name == "nodule"
    assert recipe.ignore_classes == ["7"]


def test_all_mistakes_at_once_with_suggestions(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("""
nam: x
description: d
terms: {license: a, url: b}
annotations: {reader: csv, files: {trian: a}, columns: {file: 1, box: [a, b, c], lesiom: 1}, convention: xyxi}
image: {window: {low: 3, width: 5}, orientation: canonicla, foo: 1}
classes: {a: {name: a, synonym: [x]}}
split: {by: patients, fractions: {train: .5}}
""")
    title, *lines = faults_of(path)
    assert title == f"{path}: 14 faults"
    told = {line.strip().split(": ")[0]: line for line in lines}
    for key, words in {
        "annotations.files.trian": "Did you mean 'train'?",
        "annotations.columns.box": "3 columns given; needed: 4",
        "annotations.columns.lesiom": "Did you mean 'lesion'? Allowed: box, file, lesion",
        "annotations.convention": "found 'xyxi'. Input should be 'xyxy', 'xywh' or 'cxcywh'. Did you mean 'xyxy'?",
        "name": "missing",
        "nam": "unknown key 'nam'. Did you mean 'name'? Allowed: annotations",
        "terms.license": "Did you mean 'licence'?",
        "terms.licence": "missing",
        "image.window": "width, low given; needed: centre and width, or low and high",
        "image.orientation": "Did you mean 'canonical'?",
        "image.foo": "unknown key 'foo'. Allowed: box_axes",
        "classes.a.synonym": "Did you mean 'synonyms'?",
        "split.by": "Did you mean 'patient'?",
        "split.fractions": "sum to 0.5; needed: 1",
    }.items():
        assert words in told[key], (key, told)


@pytest.mark.parametrize(
    ("annotations", "split", "extra", "words"),
    [
        (
            "{reader: cocoo, files: a}",
            "{by: patient}",
            "",
            "annotations.reader: unknown reader 'cocoo'. Did you mean 'coco'?",
        ),
        (
            "{files: a}",
            "{by: patient}",
            "",
            "annotations.reader: missing. Allowed: coco, csv, cvat, dicom_seg, folders, json, label_studio, labelme, mask, "
            "nifti_labels, padchest_gr, reports, voc, yolo",
        ),
        ("{reader: coco, files: {}}", "{by: patient}", "", "annotations.files: found dict."),
        (
            "{reader: json, files: a, boxes: b, box: c, only_class: nod}",
            "{by: patient}",
            "",
            "annotations.image: missing. Path of an image. `{key}` is its name in the object, `{field}` a field of its entry.",
        ),
        (
            "{reader: mask, files: a, only_class: nod}",
            "{by: patient}",
            "",
            "annotations.masks: missing. Path of an image's mask. `{stem}` is the image's name without ending, `{split}` the",
        ),
        (
            CSV,
            "{seed: 1}",
            "",
            "split.by: missing. `file`: `annotations.files` or `split_lists` decide. `column`: the split column of the "
            "table or JSON. `patient`: a hash of",
        ),
        ("{reader: coco, files: a}", "{by: file}", "", "split.by: is 'file', but annotations.files is one for all"),
        (CSV, "{by: column}", "", "split.by: is 'column', but annotations.columns.split names none"),
        (CSV, "{by: patient}", "image: {window: column}", "image.window: is 'column', but annotations.columns.window"),
        (CSV, "{by: patient}", "image: {window: lnug}", "image.window: unknown window 'lnug'. Did you mean 'lung'?"),
        (CSV, "{by: patient}", "image: {window: [lung, bone]}", "image.window: 2 windows given; needed: one, or three"),
        (CSV, "{by: patient}", "image: {window: [lung, bone, column]}", "image.window: unknown window 'column'"),
        (CSV, "{by: patient}", "image: {window: {low: 5, high: 1}}", "image.window: low 5.0 is not below high 1.0"),
        (CSV, "{by: patient}", "ignore_classes: [nod]", "ignore_classes: 'nod' is in classes too"),
        (CSV, "{by: patient, patient_pattern: abc}", "", "split.patient_pattern: needs a group in parentheses"),
        (CSV, "{by: patient, patient_pattern: '('}", "", "split.patient_pattern: is not a regular expression"),
        (CSV, "{by: patient, copy_pattern: '.rf.'}", "", "split.copy_pattern: needs a group in parentheses"),
        (CSV, "{by: patient}", "negatives: {only: '('}", "negatives.only: is not a regular expression"),
        (
            CSV,
            "{by: patient}",
            "negatives: {use: drop, only: a}",
            "negatives: use is 'drop', so only would have no effect",
        ),
        (
            CSV,
            "{by: patient}",
            "negatives: kep",
            "negatives.use: found 'kep'. Input should be 'keep' or 'drop'. Did you mean",
        ),
        (
            "{reader: json, files: a, image: b, boxes: c, box: [d]}",
            "{by: patient}",
            "",
            "box: 1 fields given; needed: 4",
        ),
        (
            "{reader: json, files: a, image: b, boxes: c, box: d}",
            "{by: patient}",
            "",
            "give either lesion or only_class",
        ),
        (CSV, "{by: patient}", "sha256: abc", "sha256: is filled in by umed"),
        (CSV.replace("lesion: l", "file: f"), "{by: patient}", "", "the key 'file' appears twice"),
        (CSV.replace(", lesion: l", ""), "{by: patient}", "", "annotations: give either columns.lesion or only_class"),
        ("{reader: mask, files: a, masks: b}", "{by: patient}", "", "annotations: give either values (label masks) or"),
        (CSV, "{by: [", "", "not valid YAML"),
    ],
)
def test_mistakes(tmp_path: Path, annotations: str, split: str, extra: str, words: str) -> None:
    lines = faults_of(write_recipe(tmp_path, annotations, split, extra))
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize(
    ("second", "word", "owner"),
    [
        ("{name: cyst, synonyms: [Nodular  Opacity]}", "Nodular  Opacity", "cyst"),
        ("{name: cyst, synonyms: [nodule]}", "nodule", "cyst"),
        ("{name: Nodule}", "Nodule", "Nodule"),
    ],
)
def test_a_word_for_two_classes_is_a_mistake(tmp_path: Path, second: str, word: str, owner: str) -> None:
    path = write_recipe(tmp_path, CSV)
    path.write_text(path.read_text().replace("{name: cyst}", second))
    (_, line) = faults_of(path)
    assert f"classes: {word!r} stands for 'nodule' and for {owner!r}" in line


def test_names_that_leave_no_template_are_a_mistake(tmp_path: Path) -> None:
    general = "synonyms: [finding, area, region, abnormality]}"
    path = write_recipe(tmp_path, CSV)
    path.write_text(path.read_text().replace("{name: cyst}", "{name: abnormal, " + general))
    (_, line) = faults_of(path)
    assert "classes: no answer could be written: each of umed's templates contains one of the names" in line
    path.write_text(path.read_text().replace(", region, abnormality", ""))
    load_recipe(path)
    reports = write_recipe(tmp_path, "{reader: reports, files: a.json}")
    reports.write_text(reports.read_text().replace("{name: cyst}", "{name: abnormal, " + general))
    load_recipe(reports)


def test_unknown_recipe() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'brain_tumor_coco'\?.*Or the path of a YAML file"):
        load_recipe("brain_tumour_coco")


def test_a_file_that_holds_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    assert "holds a list; a recipe is a mapping" in faults_of(tmp_path / "a.yaml")[0]


def test_data_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("brain_tumor_coco")
    monkeypatch.delenv("UMED_DATA_ROOT", raising=False)
    with pytest.raises(
        UmedError, match=r"variable is not set. Set it or give --data-root FOLDER. Get the data .*https://"
    ):
        recipe.root()
    monkeypatch.setenv("UMED_DATA_ROOT", str(tmp_path))
    assert recipe.root() == tmp_path
    with pytest.raises(UmedError, match=r"there is no data folder .*nowhere\. Give --data-root"):
        recipe.root(tmp_path / "nowhere")


def test_augment_is_checked_with_the_class_names(tmp_path: Path) -> None:
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion}}"
    rule = "augment: {flips: [left_right], rotation: 3}\n"
    recipe = load_recipe(write_recipe(tmp_path, annotations, extra=rule))
    assert recipe.augment.flips == ["left_right"] and recipe.augment.zoom == [0.9, 1.2]
    assert load_recipe("demo_studies").augment is None
    path = write_recipe(tmp_path, annotations, extra=rule)
    path.write_text(path.read_text().replace("[nodular opacity]", "[left nodule]"))
    with pytest.raises(UmedError, match=r"augment.flips: left_right would make the class name 'left nodule' false"):
        load_recipe(path)
    with pytest.raises(UmedError, match=r"augment.zoom: needed: two numbers"):
        load_recipe(write_recipe(tmp_path, annotations, extra="augment: {zoom: [2, 3]}\n"))
