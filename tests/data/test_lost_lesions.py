"""Mistakes by which a lesion would be lost: what was annotated never becomes a negative."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.annotation_files import (
    BOX,
    COCO,
    CSV,
    HEAD,
    MASK,
    VOC,
    YOLO,
    an_object,
    boxes,
    coco,
    put,
    read,
    two_regions,
    xml,
)


@pytest.mark.parametrize(
    ("values", "more", "words"),
    [
        (two_regions(1, 2), "", "has 2 painted regions below annotations.threshold 128; it holds the values 1, 2"),
        (two_regions(100, 100), "", "2 painted regions below annotations.threshold 128; it holds the values 100"),
        (two_regions(100, 255), "", "1 painted regions below annotations.threshold 128; it holds the values 100, 255"),
        (two_regions(1, 2), ", threshold: 1", ""),
        (two_regions(255, 255), "", ""),
        (two_regions(1, 1), "", ""),
    ],
)
def test_masks_below_the_threshold(tmp_path: Path, values: np.ndarray, more: str, words: str) -> None:
    put(tmp_path / "i" / "a.png", values)
    put(tmp_path / "m" / "a.png", values)
    found = read(tmp_path, MASK % more)
    if words:
        (message,) = found.faults.messages
        assert words in message
    else:
        assert boxes(found) == {"i/a.png": [(10, 10, 30, 30), (50, 50, 70, 70)]}


def test_a_second_mask_of_an_image_is_counted(tmp_path: Path) -> None:
    for name in ("a (1)", "a (1)_mask", "a (1)_mask_1", "a (1)_mask_2"):
        put(tmp_path / "b" / f"{name}.png", two_regions(255, 255))
    found = read(tmp_path, "{reader: mask, files: 'b/*).png', masks: 'b/{stem}_mask.png', only_class: nod}")
    assert list(boxes(found)) == ["b/a (1).png"]
    assert found.faults.left_out == {("masks", "a further one of its image, with a number behind the name"): 2}


def test_a_mask_whose_name_is_a_number_is_no_further_one(tmp_path: Path) -> None:
    for folder, name in (("i", "1"), ("m", "1"), ("m", "10"), ("m", "12"), ("m", "1 (2)")):
        put(tmp_path / folder / f"{name}.png", two_regions(255, 255))
    found = read(tmp_path, "{reader: mask, files: i/*.png, masks: 'm/{stem}.png', only_class: nod}")
    assert found.faults.left_out == {
        ("masks", "no image of annotations.files has this name"): 3,
        ("masks", "a further one of its image, with a number behind the name"): 1,
    }


def floats(first: float, second: float = 0) -> np.ndarray:
    values = np.zeros((80, 100), np.float32)
    values[10:30, 10:30], values[50:70, 50:70] = first, second
    return values


ONE, TWO = (10, 10, 30, 30), (50, 50, 70, 70)
CLASS_1 = ("only_class: nod", "values: {1: nod}")


@pytest.mark.parametrize(
    ("values", "ending", "options", "expected"),
    [
        (floats(0.9), "tif", (), "holds values that are not whole: 0.9. Save whole numbers"),
        (floats(1.7), "tif", CLASS_1, "holds values that are not whole: 1.7"),
        (floats(np.nan), "tif", (), "holds values that are not whole: nan"),
        (floats(0.9), "tif", ("nod", "nod, threshold: 0.5"), [ONE]),
        (floats(0.9, 0.3), "tif", ("nod", "nod, threshold: 0.5"), [ONE]),
        (floats(1), "tif", CLASS_1, [ONE]),
        (
            two_regions(255, 255),
            "png",
            ("nod", "nod, threshold: 0.5"),
            "up to 255, and annotations.threshold 0.5 is a frac",
        ),
        (two_regions(1, 2), "jpg", (), "holds only 0-"),
        (two_regions(1, 2), "jpg", ("only_class: nod", "values: {1: nod, 2: nod}"), "and JPEG leaves as much of black"),
        (two_regions(255, 255), "jpg", (), [ONE, TWO]),
        (floats(1000, 300).astype(">u2"), "tif", ("only_class: nod", "values: {1000: nod, 300: nod}"), [ONE, TWO]),
    ],
)
def test_masks_of_floats_of_jpeg_and_of_16_bits(
    tmp_path: Path, values: np.ndarray, ending: str, options: tuple[str, ...], expected: Any
) -> None:
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / f"a.{ending}", values)
    found = read(tmp_path, (MASK % "").replace("{stem}.png", f"{{stem}}.{ending}").replace(*(options or ("", ""))))
    if isinstance(expected, str):
        (message,) = found.faults.messages
        assert expected in message
    else:
        (painted,) = boxes(found).values()
        assert painted == expected


def test_fractions_below_the_threshold_are_counted_and_no_negative(tmp_path: Path) -> None:
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.tif", floats(0.3))
    found = read(tmp_path, (MASK % ", threshold: 0.5").replace("{stem}.png", "{stem}.tif"))
    assert found.items == []
    assert found.faults.left_out == {("boxes", "regions below annotations.threshold 0.5"): 1}


def test_a_mask_in_the_alpha_channel_is_a_fault(tmp_path: Path) -> None:
    values = np.zeros((80, 100, 4), np.uint8)
    values[10:30, 10:30, 3] = 255
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.png", values)
    (message,) = read(tmp_path, MASK % "").faults.messages
    assert "its shape in the alpha channel" in message


def test_values_of_one_class_stay_apart_and_a_mask_of_specks_is_left_out(tmp_path: Path) -> None:
    touching = np.zeros((80, 100), np.uint8)
    touching[10:20, 10:20], touching[20:30, 10:20] = 1, 2
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.png", touching)
    annotations = (MASK % "").replace("only_class: nod", "values: {1: nod, 2: nod, 3: cy}")
    found = read(tmp_path, annotations)
    assert boxes(found) == {"i/a.png": [(10, 10, 20, 20), (10, 20, 20, 30)]}
    assert any("annotations.values: nothing in the data is '3'" in line for line in found.faults.remarks)
    found = read(tmp_path, annotations.replace("}}", "}, min_area: 500}"))
    assert found.items == []
    assert found.left_out == {"all of its boxes are left out": 1}


@pytest.mark.parametrize("first", [0, 255])
def test_a_mask_of_several_pages_is_a_fault(tmp_path: Path, first: int) -> None:
    """With the lesions on a later page, the image would become a negative."""
    pages = [Image.fromarray(np.full((80, 100), value, np.uint8)) for value in (first, 255)]
    put(tmp_path / "i" / "a.png")
    (tmp_path / "m").mkdir()
    pages[0].save(tmp_path / "m" / "a.tif", save_all=True, append_images=pages[1:])
    found = read(tmp_path, (MASK % "").replace(".png'", ".tif'").replace("i/*.tif", "i/*.png"))
    assert ["has 2 pages" in message for message in found.faults.messages] == [True]


def huge_mask() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def mask_without_a_width() -> bytes:
    """A TIFF whose tag 256, ImageWidth, has become another one."""
    file = io.BytesIO()
    Image.fromarray(two_regions(255, 255)).save(file, "TIFF")
    width, other = (struct.pack("<HH", tag, 4) for tag in (256, 1000))
    assert width in file.getvalue()
    return file.getvalue().replace(width, other)


@pytest.mark.parametrize("write", [huge_mask, mask_without_a_width])
def test_masks_that_cannot_be_read_are_faults(tmp_path: Path, write: Callable[[], bytes]) -> None:
    put(tmp_path / "i" / "a.png")
    put(tmp_path / "m" / "a.png", write())
    (message,) = read(tmp_path, MASK % "").faults.messages
    assert re.search(r"m/a\.png: cannot be read as an image \(\w+: .*\d+ bytes\)\. Download the file again", message)


def test_inverted_masks_are_told(tmp_path: Path) -> None:
    painted = np.zeros((80, 100), np.uint8)
    painted[20:40, 10:30] = 255
    for name, values in (("a", 255 - painted), ("b", painted)):
        put(tmp_path / "i" / f"{name}.png")
        put(tmp_path / "m" / f"{name}.png", values)
    found = read(tmp_path, MASK % "")
    assert sum("in 1 of 2 masks" in remark and "inverted" in remark for remark in found.faults.remarks) == 1


def test_yolo_images_of_every_format_that_is_read_are_negatives_without_a_label(tmp_path: Path) -> None:
    for name in ("a.png", "b.webp", "c.GIF"):
        put(tmp_path / "images" / name)
    put(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2")
    assert sorted(boxes(read(tmp_path, YOLO % ""))) == ["images/a.png", "images/b.webp", "images/c.GIF"]


def test_yolo_images_of_every_ending_are_read_and_what_else_lies_there_is_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.jfif", "c.dcm", "d.jp2", "e.nii.gz", "f.DICOM", "g", "readme.txt"):
        put(tmp_path / "images" / name)
    put(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.2 0.2")
    put(tmp_path / "labels" / "e.txt", "0 0.5 0.5 0.2 0.2")
    found = read(tmp_path, YOLO % "")
    lesions = {name: len(marked) for name, marked in boxes(found).items()}
    assert lesions == {"images/a.png": 1, "images/c.dcm": 0, "images/e.nii.gz": 1, "images/f.DICOM": 0}
    counted = {why.split(",")[0]: count for (_, why), count in found.faults.left_out.items()}
    assert counted == {".jfif": 1, ".jp2": 1, "no ending": 1}


def test_masks_of_no_image_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "i" / "a.png")
    for name in ("a", "b"):
        put(tmp_path / "m" / f"{name}.png", two_regions(255, 255))
    found = read(tmp_path, MASK % "")
    assert found.faults.left_out == {("masks", "no image of annotations.files has this name"): 1}


def test_yolo_labels_in_sub_folders_and_of_another_case(tmp_path: Path) -> None:
    for name in ("s1/a", "b", "c", "other/d"):
        put(tmp_path / "images" / f"{name}.png")
    put(tmp_path / "labels" / "s1" / "a.txt", "0 0.5 0.5 0.2 0.2")
    put(tmp_path / "labels" / "b.TXT", b"\xef\xbb\xbf0 0.5 0.5 0.2 0.2")
    found = read(tmp_path, YOLO % "")
    box = pytest.approx((0.4, 0.4, 0.6, 0.6))
    assert boxes(found) == {"images/b.png": [box], "images/c.png": [], "images/s1/a.png": [box]}
    assert any("1 images are in sub folders of which" in line for line in found.faults.remarks)
    put(tmp_path / "labels" / "s2" / "lost.TXT", "0 0.5 0.5 0.2 0.2")
    (message,) = read(tmp_path, YOLO % "").faults.messages
    assert "s2/lost.TXT: there is no image s2/lost.*" in message


def test_rows_are_named_by_their_line(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", HEAD + '"a.png",10,20,30,40,"nod\n"\n\na.png\n')
    assert any("a.csv:5: has 1 cells" in message for message in read(tmp_path, CSV % "").faults.messages)


def test_a_row_that_ends_early_is_no_negative(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", HEAD + "a.png\n")
    (message,) = read(tmp_path, CSV % "").faults.messages
    assert "a.csv:2: has 1 cells, and the header has 6" in message


@pytest.mark.parametrize(("more", "expected"), [("", [BOX]), (", crowd: keep", [(0.0, 0.0, 90.0, 70.0), BOX])])
def test_crowds_are_left_out_and_counted(tmp_path: Path, more: str, expected: list[Any]) -> None:
    for name in ("a.png", "only.png"):
        put(tmp_path / name)
    crowd = ([0, 0, 90, 70], {"iscrowd": 1})
    annotations = [(1, *crowd), (1, [10, 20, 20, 20], {"iscrowd": 0}), (2, *crowd)]
    coco(tmp_path, [(1, "a.png"), (2, "only.png")], annotations)
    found = read(tmp_path, COCO % more)
    assert boxes(found)["a.png"] == expected
    assert ("only.png" in boxes(found)) == bool(more)
    assert found.faults.left_out == ({} if more else {("boxes", "iscrowd or ignore; annotations.crowd"): 2})


@pytest.mark.parametrize("written", ["1", "true", "True"])
@pytest.mark.parametrize(("more", "count"), [("", 2), (", difficult: drop", 1)])
def test_difficult_objects(tmp_path: Path, more: str, count: int, written: str) -> None:
    put(tmp_path / "img" / "a.png")
    difficult = an_object((51, 51, 70, 70), f"<difficult>{written}</difficult>")
    put(tmp_path / "xml" / "a.xml", xml("a.png", an_object(), difficult))
    found = read(tmp_path, VOC % more)
    assert len(boxes(found)["img/a.png"]) == count
    assert any("1 boxes are marked difficult" in line for line in found.faults.remarks) == (count == 2)
    assert sum(found.faults.left_out.values()) == 2 - count


def test_voc_objects_in_another_element_are_not_taken_for_none(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    put(tmp_path / "xml" / "a.xml", xml("a.png", f"<objects>{an_object()}</objects>"))
    (message,) = read(tmp_path, VOC % "").faults.messages
    assert "has 1 <object> that are not directly in <annotation>" in message
