"""Rules of a recipe about its annotations: without effect they are told, and wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.annotation_files import ALL_IN_TRAIN, BOX, CSV, HEAD, JSON, MASK, boxes, put, read

from umed_plugin.errors import UmedError


@pytest.mark.parametrize(
    ("more", "split", "extra", "words"),
    [
        (", rename: ['^x_', '']", ALL_IN_TRAIN, "", "annotations.rename matches 0 of 2 names; not 'a.png'"),
        (
            ", only_rows: {c: [nod, nodd, '']}",
            ALL_IN_TRAIN,
            "",
            "only_rows.c: nothing in the data is 'nodd', so that has no",
        ),
        (", leave_out_images: {c: ['no']}", ALL_IN_TRAIN, "", "leave_out_images.c: nothing in the data is 'no'"),
        ("", ALL_IN_TRAIN, "ignore_classes: [odd]", "ignore_classes: no annotation names 'odd' (1 of 1)"),
        ("", ALL_IN_TRAIN, "", "classes: no annotation names 'cy' (1 of 2)"),
        (
            "",
            "{by: patient, copy_pattern: '^(.+)_copy', fractions: {train: 1}}",
            "",
            "copy_pattern: matches 0 of 2 names",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {slice_axis: 1}",
            "image.slice_axis: has no effect, since it concerns NIfTI volumes",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {slices: montage}",
            "image.slices: has no effect, since it concerns DICOM and NIfTI",
        ),
        (", image_root: nowhere", ALL_IN_TRAIN, "", "annotations.image_root: there is no folder"),
        (
            "",
            ALL_IN_TRAIN,
            "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [x]}}}",
            "lists no image without a",
        ),
    ],
)
def test_rules_without_effect_are_told(tmp_path: Path, more: str, split: str, extra: str, words: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\nb.png,,,,,\n")
    found = read(tmp_path, CSV % more, split, extra + "\n")
    assert found.faults.messages == []
    assert any(words in line for line in found.faults.remarks), found.faults.remarks


def test_rename_holds_for_listed_negatives_and_a_row_with_a_finding_counts(tmp_path: Path) -> None:
    for name in ("p1", "p2", "p3"):
        put(tmp_path / f"{name}.x.dicom")
    put(tmp_path / "a.csv", HEAD + "p1,10,20,30,40,nod\np2,,,,,No finding\np3,,,,,No finding\np3,,,,,odd\n")
    listed = "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [No finding]}}}\n"
    found = read(tmp_path, CSV % r", rename: ['^(\w+)$', '\1.x.dicom'], only_rows: {c: [nod]}", extra=listed)
    assert boxes(found) == {"p1.x.dicom": [BOX], "p2.x.dicom": []}
    assert found.left_out == {"listed as negative, but not in all of its rows": 1}
    assert found.faults.left_out == {("rows of the CSV", "annotations.only_rows"): 3}


@pytest.mark.parametrize(
    ("annotations", "split", "extra", "words"),
    [
        (CSV % ", image_root: {train: a}", ALL_IN_TRAIN, "", "annotations.image_root: is given per split"),
        (CSV % ", image_root: '{stem}'", ALL_IN_TRAIN, "", "unknown name in braces 'stem'. Allowed: split"),
        (CSV % ", rename: [a, '\\2']", ALL_IN_TRAIN, "", "annotations.rename: the replacement"),
        (
            CSV % ", split_values: {1: train, '1': test}",
            ALL_IN_TRAIN,
            "",
            "annotations.split_values: the key '1' is there as number and as text",
        ),
        ((MASK % "").replace("{stem}", "{name}"), ALL_IN_TRAIN, "", "unknown name in braces 'name'"),
        (JSON.replace("{key}", "{key") % "", ALL_IN_TRAIN, "", "annotations.image: expected '}'"),
        (
            (CSV % "").replace("c}", "c, split: s}"),
            "{by: column}",
            "negatives: {listed: {files: a, file: f}}",
            "negatives.listed.split: missing",
        ),
    ],
)
def test_mistakes_of_a_recipe(tmp_path: Path, annotations: str, split: str, extra: str, words: str) -> None:
    with pytest.raises(UmedError) as caught:
        read(tmp_path, annotations, split, extra)
    assert words in str(caught.value)
