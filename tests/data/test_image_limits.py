"""Pages, deep TIFF, odd DICOM headers, and files that claim more than they should: each has its right value or one error."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless
from support.drawn import write_dicom_as, write_nifti

from umed_plugin.data.images import check_picture, load_image, open_image, read_by_llava, slice_count
from umed_plugin.data.images.stored import Limits, limited
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch


def tiff(path: Path, values: np.ndarray, photometric: int = 1, sample_format: int = 1) -> Path:
    """An uncompressed TIFF of one sample with these tags."""
    height, width = values.shape
    data, bits = values.tobytes(), values.dtype.itemsize * 8
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    content += b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    path.write_bytes(content + bytes(4))
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_a_slice_of_a_picture_is_its_page(tmp_path: Path, kind: Any, ending: str) -> None:
    if ending == "gif" and kind == np.uint16:
        return
    step = 60 if kind == np.uint8 else 10000
    pages = [Image.fromarray(np.full((80, 100), step * i, kind)) for i in range(5)]
    path = tmp_path / f"v.{ending}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert slice_count(path) == 5
    assert not read_by_llava(path)
    shown = [int(load_image(path, slice=k, window=(0.0, 40000.0))[0][0, 0, 0]) for k in range(5)]
    assert shown == ([0, 60, 120, 180, 240] if kind == np.uint8 else [0, 64, 128, 191, 255])
    with pytest.raises(UmedError, match=r"page 99 does not exist\. Allowed: 0 to 4"):
        load_image(path, slice=99)
    with pytest.raises(UmedError, match="has 5 pages and none is chosen"):
        load_image(path)


def test_a_slice_of_a_single_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((80, 100), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UmedError, match=r"page 3 does not exist\. Allowed: 0 to 0"):
        load_image(tmp_path / "a.png", slice=3)


@pytest.mark.parametrize(("kind", "sample_format"), [("<u2", 1), ("<f4", 3)])
def test_deep_tiff_in_which_white_is_zero(tmp_path: Path, kind: str, sample_format: int) -> None:
    ramp = np.tile(np.arange(100) * 600, (80, 1)).astype(kind)
    plain = load_image(tiff(tmp_path / "a.tif", ramp, 1, sample_format))[0]
    inverted = load_image(tiff(tmp_path / "b.tif", ramp, 0, sample_format))[0]
    assert (plain[0, 0, 0], plain[0, -1, 0]) == (0, 255)
    np.testing.assert_array_equal(inverted, 255 - plain)


def test_signed_16_bit_tiff(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(-50, 50) * 10, (80, 1)).astype("<i2")
    shown = load_image(tiff(tmp_path / "a.tif", ramp, 1, 2), window=(-500.0, 500.0))[0]
    assert (shown[0, 0, 0], shown[0, 50, 0]) == (0, 128)


def test_left_aligned_values_of_old_archives(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    tags = {"BitsStored": 12, "HighBit": 15}
    left = write_dicom_as(tmp_path / "a.dcm", values << 4, ExplicitVRLittleEndian, **tags)
    expected = load_image(write_dicom_as(tmp_path / "b.dcm", values, ExplicitVRLittleEndian), window=(0.0, 4095.0))[0]
    np.testing.assert_array_equal(load_image(left, window=(0.0, 4095.0))[0], expected)
    wrong = write_dicom_as(tmp_path / "c.dcm", values, ExplicitVRLittleEndian, **tags)  # right aligned after all
    np.testing.assert_array_equal(load_image(wrong, window=(0.0, 4095.0))[0], expected)


def test_float_pixels_without_bits_stored(tmp_path: Path) -> None:
    header = pydicom.dcmread(write_dicom_as(tmp_path / "a.dcm", np.zeros((6, 8), np.uint16), ExplicitVRLittleEndian))
    values = np.linspace(-1, 1, 48).astype("<f4").reshape(6, 8)
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(header, name)
    header.BitsAllocated, header.FloatPixelData = 32, values.tobytes()
    header.save_as(tmp_path / "f.dcm")
    shown = load_image(tmp_path / "f.dcm")[0][:, :, 0]
    np.testing.assert_array_equal(shown, np.rint((values + 1) / 2 * 255))


def test_a_frames_own_window_wins_over_a_stray_one(tmp_path: Path) -> None:
    window, group = pydicom.Dataset(), pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 500, 1000
    group.FrameVOILUTSequence = pydicom.Sequence([window])
    stored = np.full((1, 6, 8), 400, np.uint16)
    tags: dict[str, Any] = {"PerFrameFunctionalGroupsSequence": pydicom.Sequence([group])}
    clean = load_image(write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, **tags))[0]
    tags |= {"WindowCenter": 5000, "WindowWidth": 8000, "VOILUTFunction": "SIGMOID"}
    stray = load_image(write_dicom_as(tmp_path / "b.dcm", stored, ExplicitVRLittleEndian, **tags))[0]
    assert clean[0, 0, 0] == stray[0, 0, 0] == round((400 - 499.5) / 999 * 255 + 127.5)


def bomb(path: Path) -> Path:
    """A small file of the path's kind that claims or inflates to gigabytes."""
    if path.suffix in (".png", ".gif", ".bmp", ".tif"):
        Image.new("1", (12000, 12000)).save(path)
    elif path.suffix == ".webp":
        Image.new("L", (8, 8)).save(path, lossless=True)
        content = bytearray(path.read_bytes())
        content[21:25] = ((16383 - 1) | (16383 - 1) << 14).to_bytes(4, "little")
        path.write_bytes(content)
    elif path.name == "deflated.dcm":
        write_dicom_as(path, np.zeros((8, 8), np.uint8), DeflatedExplicitVRLittleEndian)
        meta = pydicom.filereader.read_file_meta_info(path)
        body, end = zlib.compressobj(9, zlib.DEFLATED, -15), 144 + int(meta.FileMetaInformationGroupLength)
        head, zeros = path.read_bytes()[:end], bytes(2**24)
        path.write_bytes(head + b"".join(body.compress(zeros) for _ in range(40)) + body.flush())
    elif path.name == "stream.dcm":
        file = io.BytesIO()
        Image.new("L", (2000, 1000)).save(file, "JPEG2000", no_jp2=True)
        header = pydicom.dcmread(write_dicom_as(path, np.zeros((8, 8), np.uint8), ExplicitVRLittleEndian))
        header.PixelData, header["PixelData"].VR = pydicom.encaps.encapsulate([file.getvalue()]), "OB"
        header.file_meta.TransferSyntaxUID = JPEG2000Lossless
        header.save_as(path)
    else:
        header = bytearray(write_nifti(path.with_name("small.nii"), np.zeros((4, 4, 1)), np.eye(4)).read_bytes())
        if path.name.startswith("extended"):  # one extension of 2 GB
            header[108:112], header[348] = struct.pack("<f", 360.0), 1
            header[352:360] = struct.pack("<ii", 2**31 - 16, 4)
        else:
            header[40:56] = np.array([3, 9000, 9000, 1, 1, 1, 1, 1], "<i2").tobytes()
            header[70:74] = np.array([64, 64], "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(header) + bytes(2**20)))
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.png", "12000 x 12000 pixels"),
        ("a.gif", "12000 x 12000 pixels"),
        ("a.bmp", "12000 x 12000 pixels"),
        ("a.tif", "12000 x 12000 pixels"),
        ("a.webp", "16383 x 16383 pixels"),
        ("deflated.dcm", "inflates to more than"),
        ("stream.dcm", "its compressed pixels 2000 x 1000"),
        ("large.nii.gz", "9000 x 9000 pixels of 8 bytes|more than the file can hold"),
        ("extended.nii.gz", "extensions of"),
    ],
)
def test_what_claims_too_much_is_refused_by_its_header(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UmedError, match=f"{name}.*({said})"):
        load_image(bomb(tmp_path / name))
    if not name.endswith((".dcm", ".gz")):
        for read in (open_image, check_picture):
            with pytest.raises(UmedError, match=said):
                read(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (3, 50), (2000, 4)])
def test_pictures_that_the_processor_cannot_take(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UmedError, match=rf"a\.png: has {size[0]} x {size[1]} pixels\. Allowed: sides of at least 4"):
        check_picture(tmp_path / "a.png")


def test_planes_through_a_large_volume_are_the_same_line_by_line(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((9, 8, 7))
    path = write_nifti(tmp_path / "a.nii", volume, np.eye(4))
    whole = [load_image(path, slice=3, slice_axis=axis)[0] for axis in (0, 1)]
    path.touch()
    with limited(Limits(cached=10)):
        np.testing.assert_array_equal(load_image(path, slice=3, slice_axis=0)[0], whole[0])
        np.testing.assert_array_equal(load_image(path, slice=3, slice_axis=1)[0], whole[1])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
def test_a_frame_of_a_large_file_is_the_one_of_a_small_file(tmp_path: Path, syntax: str) -> None:
    """Large pixels stay on the disk until a frame is asked for."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 256, 256), np.uint8)
    path = write_dicom_as(tmp_path / "a.dcm", frames, ExplicitVRLittleEndian)
    if syntax == JPEG2000Lossless:
        header = pydicom.dcmread(path)
        _as_jpeg2000(header, frames)
        header.save_as(path)
    for index in range(3):
        np.testing.assert_array_equal(
            load_image(path, slice=index, window="full")[0][..., 0], _full_range(frames[index])
        )


def _full_range(values: np.ndarray) -> np.ndarray:
    low, high = np.float32(values.min()), np.float32(values.max())
    return np.rint((values.astype(np.float32) - low) / (high - low) * 255).astype(np.uint8)


def _as_jpeg2000(header: Any, frames: np.ndarray) -> None:
    from pydicom.encaps import encapsulate

    streams = []
    for frame in frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "JPEG2000", irreversible=False)
        streams.append(stream.getvalue())
    header.PixelData = encapsulate(streams)
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = JPEG2000Lossless


def test_limits_are_those_of_the_innermost_block(tmp_path: Path) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    with limited(Limits(pixels=9_999)), pytest.raises(UmedError, match="100 x 100 pixels. Allowed: 1 to 9999"):
        load_image(tmp_path / "a.png")
    with limited(Limits(file=10)), pytest.raises(UmedError, match="is a picture file of 0 MB"):
        load_image(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0].shape == (100, 100, 3)


def test_items_and_deflated_bytes_of_a_dicom_are_limited(tmp_path: Path) -> None:
    path = write_dicom_as(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8), ExplicitVRLittleEndian)
    header = pydicom.dcmread(path)
    header.ReferencedImageSequence = [pydicom.Dataset() for _ in range(12)]
    header.save_as(path)
    with limited(Limits(items=11)), pytest.raises(UmedError, match="more than 11 items in its sequences"):
        load_image(path)
    with limited(Limits(items=12)):
        load_image(path, window="full")
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(path)
    with limited(Limits(inflated=100)), pytest.raises(UmedError, match="inflates to more than 100 bytes"):
        load_image(path)
