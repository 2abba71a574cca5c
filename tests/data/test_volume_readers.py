"""NIfTI label volumes and PadChest-GR: files in their published form, with made-up content, and mistakes in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from support.drawn import bright_box, write_png, write_recipe

from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

ALL_IN_TRAIN = "{by: patient, fractions: {train: 1}}"
LABELS = "{reader: nifti_labels, files: 'images/*.nii.gz', labels: 'labels/{stem}.nii.gz'%s}"
VALUES = ", values: {1: nod, 2: nod, 4: cy}"
PADCHEST = "{reader: padchest_gr, files: a.json%s}"


def read(folder: Path, annotations: str, split: str = ALL_IN_TRAIN, extra: str = "") -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, annotations, split, extra)))


def fault(found: AnnotationSet) -> str:
    (message,) = found.faults.messages
    return message


# NIfTI label volumes


def put_volume(path: Path, values: np.ndarray, shift: float = 0.0) -> None:
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def drawn() -> np.ndarray:
    """9 x 7 x 5 labels ``[x, y, z]``: slice 1 has two regions of 1; slice 3 has 1 inside 2, and a voxel of 4."""
    values = np.zeros((9, 7, 5), np.uint8)
    values[1:4, 2:4, 1] = 1
    values[6:8, 5:7, 1] = 1
    values[1:6, 1:6, 3] = 2
    values[2:4, 2:4, 3] = 1
    values[8, 0, 3] = 4
    return values


def volumes(
    folder: Path, labels: Optional[np.ndarray] = None, more: str = VALUES, shift: float = 0.0, extra: str = ""
) -> AnnotationSet:
    put_volume(folder / "images" / "a.nii.gz", np.zeros((9, 7, 5), np.int16))
    put_volume(folder / "labels" / "a.nii.gz", drawn() if labels is None else labels, shift)
    return read(folder, LABELS % more, extra=extra)


def of_slices(found: AnnotationSet) -> dict[Optional[int], list[Any]]:
    assert found.faults.messages == []
    return {item.slice: item.boxes for item in found.items}


def test_regions_of_label_volumes(tmp_path: Path) -> None:
    found = volumes(tmp_path)
    outer, inner, speck = (1, 1, 6, 6), (2, 2, 4, 4), (8, 0, 9, 1)
    assert of_slices(found) == {1: [(1, 2, 4, 4), (6, 5, 8, 7)], 3: [inner, outer, speck]}
    assert found.items[1].classes == ["nodule", "nodule", "cyst"]
    assert found.items[0].size == (9, 7)
    assert found.faults.left_out == {("slices", "without a label; annotations.negative_slices"): 3}
    assert of_slices(volumes(tmp_path, more=VALUES + ", join_values: true"))[3] == [outer, speck]


def test_slivers_ignored_values_and_negative_slices(tmp_path: Path) -> None:
    found = volumes(tmp_path, more=VALUES + ", min_area: 2, negative_slices: keep")
    assert sorted(of_slices(found), key=str) == [0, 1, 2, 3, 4]
    assert of_slices(found)[0] == []
    assert found.faults.left_out == {("boxes", "regions below annotations.min_area 2"): 1}
    organ = volumes(tmp_path, more=", values: {4: cy}, ignore_values: [1, 2]")
    assert of_slices(organ) == {3: [(8, 0, 9, 1)]}
    only_specks = volumes(tmp_path, more=", values: {4: cy}, ignore_values: [1, 2], min_area: 2, negative_slices: keep")
    assert 3 not in of_slices(only_specks)
    assert only_specks.left_out == {"all of its boxes are left out": 1}


def test_another_axis(tmp_path: Path) -> None:
    found = volumes(
        tmp_path, more=", values: {4: cy}, ignore_values: [1, 2], slice_axis: 0", extra="image: {slice_axis: 0}\n"
    )
    # Of slice x = 8: y across, z down.
    assert of_slices(found) == {8: [(0, 3, 1, 4)]}
    with pytest.raises(UmedError, match="is 0, and image.slice_axis is 2; give both the same"):
        volumes(tmp_path, more=VALUES + ", slice_axis: 0")


@pytest.mark.parametrize(
    ("labels", "more", "shift", "words"),
    [
        (drawn()[:8], VALUES, 0.0, "has the shape (8, 7, 5), and its image a.nii.gz (9, 7, 5)"),
        (drawn(), VALUES, 2.0, "lies elsewhere than its image a.nii.gz: their affines differ by up to 2"),
        (drawn(), ", values: {1: nod}", 0.0, "holds the values [2, 4]. Allowed: 0, {1: 'nod'}"),
        (drawn() * np.float32(0.5), VALUES, 0.0, "holds values that are no whole numbers"),
        (np.stack([drawn(), drawn()], axis=3), VALUES, 0.0, "has the shape (9, 7, 5, 2); needed: one volume of labels"),
    ],
)
def test_label_volumes_that_do_not_fit(tmp_path: Path, labels: Any, more: str, shift: float, words: str) -> None:
    assert words in fault(volumes(tmp_path, labels, more, shift))


def test_label_volumes_that_are_missing_damaged_or_of_no_image(tmp_path: Path) -> None:
    volumes(tmp_path)
    put_volume(tmp_path / "labels" / "b.nii.gz", drawn())
    assert ("label volumes", "no image of annotations.files belongs to them") in read(
        tmp_path, LABELS % VALUES
    ).faults.left_out
    (tmp_path / "labels" / "a.nii.gz").write_bytes(b"\x1f\x8b")
    assert "a.nii.gz: cannot be read as NIfTI" in fault(read(tmp_path, LABELS % VALUES))
    (tmp_path / "labels" / "a.nii.gz").unlink()
    assert "no such label volume (annotations.labels)" in fault(read(tmp_path, LABELS % VALUES))


def test_a_dicom_series_with_nifti_labels_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "ct" / "case00").mkdir(parents=True)
    (tmp_path / "ct" / "case00" / "1.dcm").write_bytes(b"dicom")
    put_volume(tmp_path / "labels" / "1.nii.gz", drawn())
    of_folders = fault(read(tmp_path, LABELS.replace("images/*.nii.gz", "ct/*") % VALUES))
    assert "no file matches; case00 is a folder" in of_folders
    of_files = fault(read(tmp_path, LABELS.replace("images/*.nii.gz", "ct/case00/*.dcm") % VALUES))
    assert "1.dcm: is no NIfTI file" in of_files and "dcm2niix" in of_files
    write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    put_volume(tmp_path / "a.nii.gz", drawn())
    mask = "{reader: mask, files: '*.png', masks: '{stem}.nii.gz', only_class: nod}"
    assert "nifti_labels reads label volumes" in fault(read(tmp_path, mask))


def test_names_of_a_case(tmp_path: Path) -> None:
    """As nnU-Net has them: each channel of a case is a volume, and the labels are named by the case."""
    put_volume(tmp_path / "images" / "c1_0000.nii.gz", np.zeros((9, 7, 5), np.int16))
    put_volume(tmp_path / "labels" / "c1.nii.gz", drawn())
    by_case = (LABELS % VALUES).replace("{stem}", "{case}").replace("values", "case_pattern: '^(.*)_0000$', values", 1)
    assert sorted(of_slices(read(tmp_path, by_case))) == [1, 3]
    put_volume(tmp_path / "images" / "c1_0001.nii.gz", np.zeros((9, 7, 5), np.int16))
    assert "case_pattern does not match 'c1_0001'" in fault(read(tmp_path, by_case))
    assert "is the label volume of" in fault(read(tmp_path, by_case.replace("_0000", r"_\d+")))


@pytest.mark.parametrize(
    ("more", "extra", "words"),
    [
        (VALUES + ", ignore_values: [1]", "", "[1] cannot be in values and in ignore_values"),
        (", values: {0: nod}", "", "0 cannot be in values; 0 is no label"),
        (VALUES + ", case_pattern: 'x'", "", "needs a group in parentheses"),
        (VALUES + ", case_pattern: '(x)'", "", "give case_pattern and {case} in labels together"),
        (
            VALUES,
            "image: {box_frame: displayed}\n",
            "box_axes must be left out: the reader nifti_labels computes boxes",
        ),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, more: str, extra: str, words: str) -> None:
    with pytest.raises(UmedError) as error:
        volumes(tmp_path, more=more, extra=extra)
    assert words in str(error.value)


@pytest.mark.llava
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_boxes_of_labels_are_where_the_lesion_is_shown(tmp_path: Path, axis: int) -> None:
    """Not square, not symmetric, with voxels of 1 x 1 x 3 mm: the slice is turned and resampled, and the box with it."""
    from umed_plugin.data.preparation import prepare

    labels = np.zeros((30, 24, 20), np.uint8)
    labels[5:11, 4:8, 12:17] = 1
    put_volume(tmp_path / "images" / "a.nii.gz", labels.astype(np.int16) * 1000)
    put_volume(tmp_path / "labels" / "a.nii.gz", labels)
    found = read(
        tmp_path,
        LABELS % f", values: {{1: nod}}, slice_axis: {axis}",
        extra=f"image: {{slice_axis: {axis}, window: full}}\n",
    )
    bad: list[UmedError] = []
    shown = list(prepare(found.items, found, bad))
    assert (bad, found.faults.messages) == ([], [])
    assert len(shown) == (6, 4, 5)[axis]
    for one in shown:
        # Resampling blurs edges by half a voxel of 3 mm.
        assert bright_box(one.shown) == pytest.approx(one.boxes[0], abs=1.6)


# PadChest-GR

FIRST, OTHER = [0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.7, 0.8]


def finding(
    boxes: Any = (), extra: Any = (), labels: Any = ("nod",), abnormal: Any = True, **more: Any
) -> dict[str, Any]:
    text = {"sentence_en": "Made up.", "sentence_es": "Inventado.", "locations": [], "progression": None}
    found = {"abnormal": abnormal, "boxes": list(boxes), "extra_boxes": list(extra), "labels": list(labels)}
    return {**text, **found, **more}


NORMAL = {"sentence_en": "Normal.", "sentence_es": "Normal.", "abnormal": False}


def padchest(folder: Path, studies: Any, more: str = "", split: str = ALL_IN_TRAIN) -> AnnotationSet:
    content = studies
    if isinstance(studies, dict):
        content = [
            {"StudyID": f"s{i}", "ImageID": name, "findings": found} for i, (name, found) in enumerate(studies.items())
        ]
        for name in studies:
            if os.sep not in name:
                (folder / name).touch()
    (folder / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    return read(folder, PADCHEST % more, split)


def test_findings_with_several_boxes(tmp_path: Path) -> None:
    found = padchest(
        tmp_path,
        {
            "a.png": [finding([FIRST, OTHER]), finding([FIRST], labels=["nod", "cy"]), NORMAL],
            "b.png": [NORMAL],
            "c.png": [finding()],
        },
    )
    assert found.faults.messages == []
    assert {item.image.name: (item.boxes, item.classes) for item in found.items} == {
        "a.png": ([tuple(FIRST), tuple(OTHER), tuple(FIRST)], ["nodule", "nodule", "cyst"]),
        "b.png": ([], []),
    }
    assert all(item.normalised for item in found.items)
    assert found.left_out == {"all of its boxes are left out": 1}
    assert found.faults.left_out[("findings", "abnormal, but without a box")] == 1


def test_two_readers_of_padchest_gr(tmp_path: Path) -> None:
    near = [0.12, 0.2, 0.32, 0.4]
    studies = {"a.png": [finding([FIRST], [near])], "b.png": [finding([], [OTHER])], "c.png": [NORMAL]}
    found = padchest(tmp_path, studies)
    assert {item.image.name: item.boxes for item in found.items} == {"a.png": [tuple(FIRST)], "c.png": []}
    assert found.faults.left_out[("boxes", "extra_boxes, of a second reader; annotations.readers")] == 2
    found = padchest(tmp_path, studies, ", readers: {use: extra_boxes}")
    assert {item.image.name: item.boxes for item in found.items} == {
        "a.png": [tuple(near)], "b.png": [tuple(OTHER)], "c.png": []
    }  # fmt: skip
    found = padchest(tmp_path, studies, ", readers: {consensus: wbf}")
    assert {item.image.name: item.boxes for item in found.items} == {
        "a.png": [pytest.approx((0.11, 0.2, 0.31, 0.4))], "c.png": []
    }  # fmt: skip


def test_the_table_of_padchest_gr(tmp_path: Path) -> None:
    rows = "StudyID,ImageID,label,split,PatientID\ns0,a.png,nod,validation,p1\ns0,a.png,cy,validation,p1\ns1,b.png,,test,p2\n"
    (tmp_path / "t.csv").write_text(rows + "\n")
    studies = {"a.png": [finding([FIRST])], "b.png": [NORMAL]}
    found = padchest(tmp_path, studies, ", table: t.csv", "{by: column}")
    assert [(item.patient, item.split) for item in found.items] == [("p1", "val"), ("p2", "test")]
    with pytest.raises(UmedError, match="split.by: is 'column'"):
        padchest(tmp_path, studies, "", "{by: column}")
    for wrong, words in (
        (rows.replace("s1", "s9"), "study 's1' is not in annotations.table"),
        (rows.replace("test", "exam"), "split is 'exam'. Allowed: train, validation"),
        (rows.replace("PatientID", "Person"), "has no column PatientID"),
        (rows + "s0,a.png,cy,test,p1\n", "gives study s0 another patient or split"),
        (rows + "s0,a.png\n", "has 2 cells, and the header has 5"),
        (rows + "s0,a.png,nod, small,validation,p1\n", "has 6 cells, and the header has 5. Put text that holds ','"),
    ):
        (tmp_path / "t.csv").write_text(wrong)
        assert words in padchest(tmp_path, studies, ", table: t.csv", "{by: column}").faults.messages[0]


@pytest.mark.parametrize(
    ("studies", "words"),
    [
        ({"a.png": [finding([[1, 2, 3]])]}, "needs lists of boxes [x1, y1, x2, y2] in 0-1"),
        ({"a.png": [finding([[10, 20, 30, 40]])]}, "far outside of its image"),
        ({"a.png": [finding([FIRST], labels=[])]}, "has a box, but no label"),
        ({"a.png": [finding([FIRST], abnormal=False)]}, "has a box, but abnormal is false"),
        ({"a.png": [finding([FIRST], abnormal="yes")]}, "needs 'abnormal': true or false"),
        ({f"..{os.sep}x.png": [NORMAL]}, "is not in the data root"),
        ({"studies": []}, "needs a text 'ImageID'"),
        ([{"ImageID": "a.png"}], "needs a text 'ImageID' and a list 'findings'"),
    ],
)
def test_mistakes_in_padchest_gr(tmp_path: Path, studies: Any, words: str) -> None:
    (tmp_path.parent / "x.png").touch()
    if "studies" in studies:
        studies = [[]]
    assert words in fault(padchest(tmp_path, studies))
