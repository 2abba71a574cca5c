"""DICOM segmentations in the form that the standard has (PS3.3 A.51), with made-up content, and mistakes in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from support.drawn import bright_box, write_dicom, write_recipe

from umed_plugin.data.annotations import AnnotationSet, read_annotations
from umed_plugin.data.recipes.recipe import load_recipe

pytestmark = pytest.mark.llava  # writing DICOM needs pydicom 3
SEG = "{reader: dicom_seg, files: 'seg/*.dcm', image_root: ct%s}"
SERIES = "1.2.3.4"


def write_series(folder: Path, count: int = 4) -> list[str]:
    """Single-frame slices of 9 x 7 pixels; the UIDs of their instances."""
    import pydicom

    (folder / "ct").mkdir(parents=True, exist_ok=True)
    uids = []
    for z in range(count):
        path = write_dicom(
            folder / "ct" / f"{z}.dcm", np.zeros((7, 9)), SeriesInstanceUID=SERIES, ImagePositionPatient=[0, 0, z]
        )
        uids.append(str(pydicom.dcmread(path).SOPInstanceUID))
    return uids


def write_seg(
    path: Path,
    frames: list[tuple[Optional[str], int, np.ndarray]],
    *,
    labels: tuple[str, ...] = ("nod", "cy"),
    places: Optional[list[float]] = None,
    kind: str = "BINARY",
) -> None:
    """Frames are (UID of the source or None, segment number, values ``[row, column]``)."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.pixels import pack_bits
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    seg = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    seg.SOPClassUID, seg.SOPInstanceUID, seg.Modality = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
        "SEG",
    )
    seg.SegmentationType = kind
    seg.SegmentSequence = []
    for number, label in enumerate(labels, start=1):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, label
        seg.SegmentSequence.append(segment)
    directions = Dataset()
    directions.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared = Dataset()
    shared.PlaneOrientationSequence = [directions]
    seg.SharedFunctionalGroupsSequence = [shared]
    seg.PerFrameFunctionalGroupsSequence = [
        _groups(*frame[:2], places[i] if places else None) for i, frame in enumerate(frames)
    ]
    values = np.stack([frame[2] for frame in frames])
    seg.NumberOfFrames, seg.Rows, seg.Columns = values.shape
    seg.SamplesPerPixel, seg.PhotometricInterpretation, seg.PixelRepresentation = 1, "MONOCHROME2", 0
    if kind == "BINARY":
        seg.BitsAllocated, seg.BitsStored, seg.HighBit = 1, 1, 0
        seg.PixelData = pack_bits(values.astype(np.uint8).ravel())
    else:
        seg.BitsAllocated, seg.BitsStored, seg.HighBit, seg.MaximumFractionalValue = 8, 8, 7, 200
        seg.PixelData = values.astype(np.uint8).tobytes() + b"\0" * (values.size % 2)
    path.parent.mkdir(exist_ok=True)
    seg.save_as(path, enforce_file_format=True)


def _groups(uid: Optional[str], segment: int, z: Optional[float]) -> Any:
    from pydicom.dataset import Dataset

    group, identified = Dataset(), Dataset()
    identified.ReferencedSegmentNumber = segment
    group.SegmentIdentificationSequence = [identified]
    if uid is not None:
        image, derived = Dataset(), Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", uid
        derived.SourceImageSequence = [image]
        group.DerivationImageSequence = [derived]
    if z is not None:
        position = Dataset()
        position.ImagePositionPatient = [0, 0, z]
        group.PlanePositionSequence = [position]
    return group


def layer(*boxes: tuple[int, int, int, int], value: int = 1) -> np.ndarray:
    values = np.zeros((7, 9), np.uint8)
    for x1, y1, x2, y2 in boxes:
        values[y1:y2, x1:x2] = value
    return values


def read(folder: Path, more: str = "") -> AnnotationSet:
    return read_annotations(load_recipe(write_recipe(folder, SEG % more, "{by: patient, fractions: {train: 1}}")))


def boxes(found: AnnotationSet) -> dict[str, list[Any]]:
    assert found.faults.messages == []
    return {os.path.basename(item.image): list(zip(item.classes, item.boxes)) for item in found.items}


ONE, TWO, SPECK = (1, 2, 4, 4), (6, 5, 8, 7), (0, 0, 1, 1)


def test_segments_become_boxes_of_their_sources(tmp_path: Path) -> None:
    uids = write_series(tmp_path)
    write_seg(
        tmp_path / "seg" / "s.dcm",
        [(uids[2], 1, layer(ONE, TWO)), (uids[2], 2, layer(SPECK)), (uids[1], 2, layer(ONE))],
    )
    found = read(tmp_path)
    assert boxes(found) == {
        "2.dcm": [("nodule", ONE), ("nodule", TWO), ("cyst", SPECK)],
        "1.dcm": [("cyst", ONE)],
    }
    assert found.items[0].size == (9, 7)
    assert found.faults.left_out == {
        ("images", "of a segmented series, without a region; annotations.negative_slices"): 2
    }
    kept = boxes(read(tmp_path, ", negative_slices: keep"))
    assert (kept["0.dcm"], kept["3.dcm"], len(kept)) == ([], [], 4)
    assert boxes(read(tmp_path, ", ignore_segments: [cy], segments: {1: cy}")) == {
        "2.dcm": [("cyst", ONE), ("cyst", TWO)]
    }
    assert any(
        "annotations.segments: nothing in the data is 'x'" in line
        for line in read(tmp_path, ", segments: {x: cy}").told()
    )
    found = read(tmp_path, ", ignore_segments: [nod, 3], min_area: 2, negative_slices: keep")
    assert boxes(found)["1.dcm"] == [("cyst", ONE)]
    assert "2.dcm" not in boxes(found)
    assert found.left_out == {"all of its boxes are left out": 1}


def test_several_segmentations_of_one_series(tmp_path: Path) -> None:
    uids = write_series(tmp_path, count=3)
    for name, uid in zip("AB", uids):
        write_seg(tmp_path / "seg" / f"{name}.dcm", [(uid, 1, layer(ONE))])
    found = read(tmp_path)
    assert boxes(found) == {"0.dcm": [("nodule", ONE)], "1.dcm": [("nodule", ONE)]}
    assert found.faults.left_out == {
        ("images", "of a segmented series, without a region; annotations.negative_slices"): 1
    }
    kept = read(tmp_path, ", negative_slices: keep")
    assert boxes(kept) == {**boxes(found), "2.dcm": []}
    assert not any("again" in line for line in kept.told())


def test_fractions_and_frames_without_a_reference(tmp_path: Path) -> None:
    write_series(tmp_path)
    values = layer(ONE, value=100) + layer(TWO, value=99)
    write_seg(tmp_path / "seg" / "s.dcm", [(None, 1, values)], places=[3.0], kind="FRACTIONAL")
    assert boxes(read(tmp_path)) == {"3.dcm": [("nodule", ONE)]}
    assert boxes(read(tmp_path, ", threshold: 0.4")) == {"3.dcm": [("nodule", ONE), ("nodule", TWO)]}


def test_boxes_are_where_the_segment_is_shown(tmp_path: Path) -> None:
    """A prone patient: the slice is turned by half for display, and the box with it."""
    import pydicom

    from umed_plugin.data.preparation import prepare

    values = np.zeros((40, 50))
    values[4:14, 6:26] = 1
    turned = [-1, 0, 0, 0, -1, 0]
    (tmp_path / "ct").mkdir()
    path = write_dicom(tmp_path / "ct" / "0.dcm", values, orientation=turned, SeriesInstanceUID=SERIES)
    uid = str(pydicom.dcmread(path).SOPInstanceUID)
    write_seg(tmp_path / "seg" / "s.dcm", [(uid, 1, values)])
    found = read(tmp_path)
    (shown,) = prepare(found.items, found, [])
    assert shown.boxes == [bright_box(shown.shown)] == [(24, 26, 44, 36)]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda p, u: write_seg(p, [("9.9", 1, layer(ONE))]),
            "0 images in annotations.image_root have SOPInstanceUID 9.9",
        ),
        (lambda p, u: write_seg(p, [(None, 1, layer(ONE))]), "0 images in annotations.image_root have its position"),
        (lambda p, u: write_seg(p, [(u[0], 3, layer(ONE))]), "segment 3 is not in the SegmentSequence"),
        (
            lambda p, u: write_seg(p, [(u[0], 1, layer(ONE))], places=[2.0]),
            "is turned or shifted against its source 0.dcm",
        ),
        (lambda p, u: write_seg(p, [(u[0], 1, layer(ONE)[:6])]), "is 9x6, and its source 0.dcm 9x7"),
        (
            lambda p, u: write_seg(p, [(u[0], 1, layer(ONE))], labels=("wart",)),
            "class 'wart' (1 boxes) is not in the recipe",
        ),
        (lambda p, u: p.write_bytes(b"x" * 200), "cannot be read as DICOM"),
        (lambda p, u: write_dicom(p, np.zeros((7, 9))), "is no DICOM segmentation (SOP class"),
    ],
)
def test_mistakes_in_segmentations(tmp_path: Path, write: Any, words: str) -> None:
    uids = write_series(tmp_path)
    (tmp_path / "seg").mkdir()
    write(tmp_path / "seg" / "s.dcm", uids)
    (message,) = read(tmp_path).faults.messages
    assert words in message


@pytest.mark.parametrize("tag", ["SegmentNumber", "ReferencedSegmentNumber", "ReferencedSOPInstanceUID", "Rows"])
def test_a_segmentation_without_a_tag_that_it_needs(tmp_path: Path, tag: str) -> None:
    import pydicom

    uids = write_series(tmp_path)
    path = tmp_path / "seg" / "s.dcm"
    write_seg(path, [(uids[0], 1, layer(ONE))], labels=("nod",))
    seg = pydicom.dcmread(path)
    frame = seg.PerFrameFunctionalGroupsSequence[0]
    image = frame.DerivationImageSequence[0].SourceImageSequence[0]
    for part in (seg, seg.SegmentSequence[0], frame.SegmentIdentificationSequence[0], image):
        if tag in part:
            delattr(part, tag)
    seg.save_as(path)
    (message,) = read(tmp_path).faults.messages
    assert re.search(
        rf"s\.dcm: cannot be read as a DICOM segmentation \(AttributeError: .*'{tag}'; \d+ bytes\)", message
    )


def test_a_source_that_is_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    uids = write_series(tmp_path)
    (tmp_path / "seg").mkdir()
    write_seg(tmp_path / "seg" / "s.dcm", [(uids[0], 1, layer(ONE))])
    (tmp_path / "ct" / "3.dcm").unlink()
    (tmp_path / "ct" / "3.dcm").symlink_to("XX")
    (message,) = read(tmp_path, ", negative_slices: keep").faults.messages
    assert "ct/3.dcm: is a link to XX, which is not there" in message


def test_one_instance_in_two_files(tmp_path: Path) -> None:
    uids = write_series(tmp_path)
    (tmp_path / "ct" / "copy.dcm").write_bytes((tmp_path / "ct" / "0.dcm").read_bytes())
    write_seg(tmp_path / "seg" / "s.dcm", [(uids[0], 1, layer(ONE))])
    (message,) = read(tmp_path).faults.messages
    assert "2 images in annotations.image_root have SOPInstanceUID" in message
