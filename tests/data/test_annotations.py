"""Every annotation format holds the same two images and must give the same boxes; then what is special to one format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.annotation_formats import (
    CSV,
    SECOND,
    X1,
    X2,
    Y1,
    Y2,
    by_name,
    coco,
    csv_xyxy,
    json_by_image,
    mask,
    read,
    two_images,
    voc,
    yolo,
)
from support.drawn import BOX, HEIGHT, WIDTH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_images(tmp_path)


def csv_xywh_by_number(folder: Path) -> str:
    """NIH's header names one column for four."""
    (folder / "a.csv").write_text(
        f'Image,Label,"Bbox [x,y,w,h]",,,\npos.png,nod,{X1},{Y1},{X2 - X1},{Y2 - Y1}\npos.png,cy,60,30,10,25\nneg.png,,,,,\n'
    )
    return "{reader: csv, files: a.csv, convention: xywh, columns: {file: 0, box: [2, 3, 4, 5], lesion: 1}}"


def csv_cxcywh_normalised_in_one_column(folder: Path) -> str:
    rows = [
        f"{(x1 + x2) / 2 / WIDTH}, {(y1 + y2) / 2 / HEIGHT}, {(x2 - x1) / WIDTH}, {(y2 - y1) / HEIGHT}"
        for x1, y1, x2, y2 in (BOX, SECOND)
    ]
    # With Excel's byte-order mark and semicolons.
    text = f'\ufefffile;box;lesion\npos;"{rows[0]}";nod\npos;"{rows[1]}";cy\nneg;;\n'
    (folder / "a.csv").write_text(text, encoding="utf-8")
    return (
        "{reader: csv, files: a.csv, convention: cxcywh, normalised: true, delimiter: ';', "
        "rename: ['^(\\w+)$', '\\1.png'], columns: {file: file, box: box, lesion: lesion}}"
    )


def json_list_xywh(folder: Path) -> str:
    boxes = [{"at": [X1, Y1, X2 - X1, Y2 - Y1], "what": "nod"}, {"at": [60, 30, 10, 25], "what": "cy"}]
    (folder / "a.json").write_text(
        json.dumps([{"name": "pos", "of": 7, "found": boxes}, {"name": "neg", "of": 8, "found": []}])
    )
    return (
        "{reader: json, files: a.json, image: '{name}.png', boxes: found, box: at, lesion: what, convention: xywh, "
        "patient: of}"
    )


FORMATS = [coco, voc, yolo, csv_xyxy, csv_xywh_by_number, csv_cxcywh_normalised_in_one_column, mask]
FORMATS += [json_by_image, json_list_xywh]


@pytest.mark.parametrize("written", FORMATS)
def test_all_formats_agree(folder: Path, written: Any) -> None:
    items = by_name(read(folder, written(folder)))
    assert set(items) == {"pos.png", "neg.png"}
    positive, negative = items["pos.png"], items["neg.png"]
    scale = np.array([WIDTH, HEIGHT] * 2 if positive.normalised else [1] * 4)
    np.testing.assert_allclose(np.array(positive.boxes) * scale, [BOX, SECOND], atol=1e-6)
    assert positive.classes == ["nodule", "cyst"]
    assert negative.boxes == negative.classes == []
    assert positive.size in (None, (WIDTH, HEIGHT))
    assert positive.modality == "CT"
    assert positive.image == folder / "pos.png"


@pytest.mark.parametrize(("convention", "shift"), [("inclusive", (1, 1, 1, 1)), ("half_open", (1, 1, 0, 0))])
def test_voc_conventions(folder: Path, convention: str, shift: tuple[int, ...]) -> None:
    annotations = voc(folder).replace("}", f", convention: {convention}}}")
    expected = [value + add for value, add in zip(BOX, shift)]
    assert list(by_name(read(folder, annotations))["pos.png"].boxes[0]) == expected


def test_voc_split_lists_leave_the_unlisted_out(folder: Path) -> None:
    (folder / "val.txt").write_text("pos\n")
    annotations = voc(folder).replace("}", ", split_lists: {val: val.txt}}")
    items = by_name(read(folder, annotations, "{by: file}"))
    assert {name: item.split for name, item in items.items()} == {"pos.png": "val"}


def test_mask_regions_slivers_and_jpeg_noise(folder: Path) -> None:
    """Grey values around 0 and 255 are JPEG's; touching corners are one region; 3 pixels are a sliver."""
    values = np.full((HEIGHT, WIDTH), 20, np.uint8)
    values[5:10, 5:10] = 240
    values[10:15, 10:12] = 200
    values[40, 50:53] = 255
    values[30:36, 80:85] = 250
    Image.fromarray(values).save(folder / "pos_m.png")
    Image.fromarray(values * 0).save(folder / "neg_m.png")
    annotations = "{reader: mask, files: '???.png', masks: '{stem}_m.png', only_class: nod, min_area: 4}"
    items = by_name(read(folder, annotations))
    assert items["pos.png"].boxes == [(5, 5, 12, 15), (80, 30, 85, 36)]
    assert items["neg.png"].boxes == []


def test_one_bit_masks(folder: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), bool)
    values[5:10, 5:11] = True
    for name in ("pos", "neg"):
        Image.fromarray(values if name == "pos" else ~values & False).save(folder / f"{name}_m.png")
    found = by_name(read(folder, "{reader: mask, files: '???.png', masks: '{stem}_m.png', only_class: nod}"))
    assert found["pos.png"].boxes == [(5, 5, 11, 10)]


def test_csv_slices_patients_splits_and_windows(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,who,set,mod,slice,win,keep\n"
        'v.nii.gz,1,2,3,4,nod,p1,1,MR,3,"-175, 275",yes\n'
        "v.nii.gz,5,6,7,8,nod,p1,1,MR,3,,yes\n"
        "v.nii.gz,1,2,3,4,nod,p1,1,MR,4.0,,yes\n"
        "v.nii.gz,1,2,3,4,nod,p1,1,MR,5,,no\n"
        "pos.png,,,,,,p2,2,,,,yes\n"
    )
    (folder / "v.nii.gz").write_bytes(b"")
    further = "patient: who, split: set, modality: mod, slice: slice, window: win"
    rules = "split_values: {1: train, 2: test}, only_rows: {keep: ['yes']}"
    annotations = CSV.replace("lesion: lesion", f"lesion: lesion, {further}") % f", {rules}"
    found = read(folder, annotations, "{by: column}")
    assert found.faults.messages == []
    told = [(i.image.name, i.slice, len(i.boxes), i.patient, i.split, i.modality, i.window) for i in found.items]
    assert told == [
        ("v.nii.gz", 3, 2, "p1", "train", "MR", (-175.0, 275.0)),
        ("v.nii.gz", 4, 1, "p1", "train", "MR", None),
        ("pos.png", None, 0, "p2", "test", "CT", None),
    ]


def test_csv_without_the_optional_slice_column(folder: Path) -> None:
    csv_xyxy(folder)
    items = by_name(read(folder, CSV.replace("lesion: lesion", "lesion: lesion, slice: slice") % ""))
    assert items["pos.png"].slice is None
