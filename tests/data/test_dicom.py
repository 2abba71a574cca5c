"""DICOM as scanners write it: windows, tables, colours, frames and transfer syntaxes, each beside an independent reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from support.drawn import BOX, bright_box, scene, write_dicom, write_dicom_as

from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError, UsageError

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch

RAMP = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)


def item(**elements: Any) -> Dataset:
    found = Dataset()
    for name, value in elements.items():
        setattr(found, name, value)
    return found


def grey(path: Path, **options: Any) -> np.ndarray:
    image, _ = load_image(path, orientation="as_stored", **options)
    assert (image == image[:, :, :1]).all()
    return image[:, :, 0]


@pytest.mark.filterwarnings("ignore:overflow")  # pydicom's own
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(("centre", "width"), [(40, 400), (-600, 1500), (100.5, 1), (0, 2)])
def test_windows_are_those_of_the_standard(tmp_path: Path, function: str, centre: float, width: float) -> None:
    """pydicom computes them too, into the range of the stored values."""
    tags = {} if function is None else {"VOILUTFunction": function}
    path = write_dicom_as(
        tmp_path / "a.dcm", RAMP, ExplicitVRLittleEndian, WindowCenter=centre, WindowWidth=width, **tags
    )
    theirs = apply_windowing(RAMP, pydicom.dcmread(path))
    expected = (theirs + 2**15) / (2**16 - 1) * 255
    assert np.abs(grey(path) - expected).max() <= 0.51
    assert len(np.unique(grey(path))) > (1 if width <= 2 else 100)


def test_an_unknown_window_function_is_refused_unless_the_recipe_chooses(tmp_path: Path) -> None:
    path = write_dicom_as(
        tmp_path / "a.dcm", RAMP, ExplicitVRLittleEndian, WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"
    )
    with pytest.raises(UmedError, match=r"function is 'CUBIC'\. Allowed: LINEAR, LINEAR_EXACT, SIGMOID"):
        load_image(path)
    assert grey(path, window=(0.0, 100.0)).max() == 255


@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
@pytest.mark.parametrize(("centre", "width"), [("nan", "5"), ("40", "inf")])
def test_a_window_that_is_no_number_is_an_error(centre: str, width: str, tmp_path: Path) -> None:
    path = write_dicom_as(tmp_path / "a.dcm", RAMP, ExplicitVRLittleEndian, WindowCenter=centre, WindowWidth=width)
    with pytest.raises(UmedError, match=f"centre {centre} and width {width}; needed: numbers. Choose another"):
        load_image(path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("first", [-1024, 0, 1000])
def test_voi_tables(tmp_path: Path, syntax: str, bits: int, first: int) -> None:
    """A table of 1000 entries, with values below and above it."""
    entries = np.round(np.linspace(0, 1, 1000) ** 2 * (2**bits - 1)).astype(int)
    table = item(LUTDescriptor=[1000, first, bits], LUTData=[int(entry) for entry in entries])
    table["LUTDescriptor"].VR, table["LUTData"].VR = "SS" if first < 0 else "US", "US"
    path = write_dicom_as(tmp_path / "a.dcm", RAMP, syntax, VOILUTSequence=Sequence([table]))
    expected = entries[np.clip(RAMP.astype(int) - first, 0, 999)] / (2**bits - 1) * 255
    assert np.abs(grey(path) - expected).max() <= 0.51
    if bits > 8:  # where pydicom's own index does not wrap
        theirs = apply_voi_lut(RAMP.astype(int), pydicom.dcmread(path))
        assert np.abs(grey(path) - theirs / (2**bits - 1) * 255).max() <= 0.51


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (-1, 3071)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_voi_table_begins_below_0_where_the_rescale_gives_such_values(
    tmp_path: Path, syntax: str, slope: int, intercept: int
) -> None:
    """Of pixels without a sign, as in most CT: in implicit VR its first value reads as 64512."""
    entries = np.linspace(0, 65535, 4096).astype(int)
    table = item(LUTDescriptor=[4096, -1024, 16], LUTData=[int(entry) for entry in entries])
    table["LUTDescriptor"].VR, table["LUTData"].VR = "SS", "US"
    stored = ((RAMP.astype(int) - intercept) * slope).astype(np.uint16)
    tags = {"RescaleSlope": slope, "RescaleIntercept": intercept, "VOILUTSequence": Sequence([table])}
    path = write_dicom_as(tmp_path / "a.dcm", stored, syntax, **tags)
    assert np.abs(grey(path).ravel() - entries / 65535 * 255).max() <= 0.51


def test_modality_tables_come_before_the_window(tmp_path: Path) -> None:
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    entries = [int(value) for value in np.linspace(3000, 0, 4096)]
    table = item(LUTDescriptor=[4096, 0, 16], LUTData=entries, ModalityLUTType="OD")
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, ModalityLUTSequence=Sequence([table]))
    theirs = apply_modality_lut(stored, pydicom.dcmread(path))
    np.testing.assert_array_equal(theirs.ravel(), entries)
    assert np.abs(grey(path, window="full") - theirs / 3000 * 255).max() <= 0.51


def test_modality_tables_extend_at_both_ends(tmp_path: Path) -> None:
    """Values beyond the table, of a type in which their distance from its first value is not a number."""
    stored = np.linspace(-32768, 32767, 4096).astype(np.int16).reshape(64, 64)
    entries = [int(value) for value in np.linspace(1000, 3000, 100)]
    table = item(LUTDescriptor=[100, -1024, 16], LUTData=entries, ModalityLUTType="OD")
    table["LUTDescriptor"].VR, table["LUTData"].VR = "SS", "US"
    path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, ModalityLUTSequence=Sequence([table]))
    expected = np.array(entries)[np.clip(stored.astype(int) + 1024, 0, 99)]
    assert np.abs(grey(path, window="full") - (expected - 1000) / 2000 * 255).max() <= 0.51


def test_a_table_without_enough_data_is_refused(tmp_path: Path) -> None:
    table = item(LUTDescriptor=[1000, 0, 12], LUTData=[1, 2, 3])
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write_dicom_as(tmp_path / "a.dcm", RAMP, ExplicitVRLittleEndian, VOILUTSequence=Sequence([table]))
    with pytest.raises(UmedError, match="table of 1000 entries with data for 3"):
        load_image(path)


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_uncompressed_syntaxes(tmp_path: Path, syntax: str) -> None:
    path = write_dicom_as(tmp_path / "a.dcm", RAMP, syntax)
    np.testing.assert_array_equal(grey(path), np.rint((RAMP + 1024.0) / 4095 * 255))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("frames", [1, 3])
def test_compressed_frames(tmp_path: Path, syntax: str, frames: int) -> None:
    from PIL import Image
    from pydicom.encaps import encapsulate

    stored = np.stack([RAMP.astype(np.uint16) + 4000 + 7 * number * (RAMP > 0) for number in range(frames)])
    stored = stored.astype(np.uint16)
    path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian)
    header = pydicom.dcmread(path)
    if syntax == RLELossless:
        header.compress(RLELossless)
    else:
        import io

        codes = []
        for frame in stored:
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG2000", irreversible=False, no_jp2=True)
            codes.append(file.getvalue())
        header.PixelData, header["PixelData"].VR = encapsulate(codes), "OB"
        header.file_meta.TransferSyntaxUID = JPEG2000Lossless
    header.save_as(path)
    for number in range(frames):
        low, high = stored[number].min(), stored[number].max()
        shown = grey(path, slice=number if frames > 1 else None, window="full")
        assert np.abs(shown - (stored[number].astype(float) - low) / (high - low) * 255).max() <= 0.51


def test_files_without_their_beginning_are_read(tmp_path: Path) -> None:
    """No preamble and no file meta information, as old archives have them."""
    for syntax, is_implicit, is_little in [
        (ImplicitVRLittleEndian, True, True),
        (ExplicitVRLittleEndian, False, True),
        (ExplicitVRBigEndian, False, False),
    ]:
        header = pydicom.dcmread(write_dicom_as(tmp_path / "whole.dcm", RAMP, syntax))
        bare = Dataset()
        bare.update(header)
        bare.save_as(tmp_path / "bare.dcm", implicit_vr=is_implicit, little_endian=is_little)
        np.testing.assert_array_equal(grey(tmp_path / "bare.dcm"), grey(tmp_path / "whole.dcm"))


@pytest.mark.parametrize(
    ("photometric", "planar"), [("YBR_FULL", 0), ("YBR_FULL", 1), ("YBR_FULL_422", 0), ("RGB", 0), ("RGB", 1)]
)
def test_colours(tmp_path: Path, photometric: str, planar: int) -> None:
    """PIL's own conversion of the same picture is the independent reading."""
    from PIL import Image

    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:20, :30], rgb[20:, :30], rgb[:20, 30:] = (200, 90, 30), (10, 240, 80), (30, 30, 250)
    tags: dict[str, Any] = {"PhotometricInterpretation": photometric, "PlanarConfiguration": planar}
    stored = rgb if photometric == "RGB" else np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    if photometric == "YBR_FULL_422":
        pairs = np.stack([stored[:, ::2, 0], stored[:, 1::2, 0], stored[:, ::2, 1], stored[:, ::2, 2]], axis=2)
        path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, **tags)
        header = pydicom.dcmread(path)
        header.PixelData = pairs.tobytes()
        header.save_as(path)
    else:
        path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, **tags)
        if planar:
            header = pydicom.dcmread(path)
            header.PixelData = np.moveaxis(stored, 2, 0).tobytes()
            header.save_as(path)
    image, _ = load_image(path)
    assert np.abs(image.astype(int) - rgb).max() <= 2
    np.testing.assert_array_equal(load_image(path, window="lung")[0], image)


def test_colour_of_16_bits_becomes_8(tmp_path: Path) -> None:
    rgb = (np.arange(64 * 64 * 3).reshape(64, 64, 3) * 5 % 65536).astype(np.uint16)
    image, _ = load_image(write_dicom_as(tmp_path / "a.dcm", rgb, ExplicitVRLittleEndian))
    assert np.abs(image - rgb / 65535 * 255).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(tmp_path: Path, bits: int) -> None:
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) * 7 % 256], axis=1)
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for column, name in enumerate(["Red", "Green", "Blue"]):
        entries = colours[:, column].astype("<u1" if bits == 8 else "<u2") * (1 if bits == 8 else 257)
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    stored = np.arange(64 * 64, dtype=np.int64).reshape(64, 64) % 256
    path = write_dicom_as(tmp_path / "a.dcm", stored.astype(np.uint8), ExplicitVRLittleEndian, **tags)
    image, _ = load_image(path)
    np.testing.assert_array_equal(image, colours[stored])


def test_padding_is_black_and_no_part_of_the_range(tmp_path: Path) -> None:
    stored = RAMP.copy()
    stored[:10] = -2000
    path = write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, PixelPaddingValue=-2000)
    shown = grey(path)
    assert (shown[:10] == 0).all()
    assert shown[10, 0] == 0
    assert shown[10, 63] > 0  # -2000 would have taken a fifth of the range
    inverted = write_dicom_as(
        tmp_path / "b.dcm",
        stored,
        ExplicitVRLittleEndian,
        PixelPaddingValue=-2000,
        PhotometricInterpretation="MONOCHROME1",
    )
    np.testing.assert_array_equal(grey(inverted)[10:], 255 - shown[10:])
    assert (grey(inverted)[:10] == 0).all()


def test_8_bit_grey_without_a_window_is_shown_as_it_is(tmp_path: Path) -> None:
    stored = np.linspace(50, 99, 4096).astype(np.uint8).reshape(64, 64)
    np.testing.assert_array_equal(grey(write_dicom_as(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian)), stored)
    inverted = write_dicom_as(
        tmp_path / "b.dcm", stored, ExplicitVRLittleEndian, PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(grey(inverted), 255 - stored)


def test_enhanced_files_keep_rescale_window_and_directions_in_groups(tmp_path: Path) -> None:
    stored = np.rint(np.stack([scene(), scene(), scene()]) * 1000).astype(np.uint16)
    groups = [
        item(
            PixelValueTransformationSequence=Sequence([item(RescaleSlope=slope, RescaleIntercept=-1000)]),
            PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])]),
        )
        for slope in (1, 2, 3)
    ]
    shared = item(FrameVOILUTSequence=Sequence([item(WindowCenter=0, WindowWidth=2000)]))
    path = write_dicom_as(
        tmp_path / "a.dcm",
        stored,
        ExplicitVRLittleEndian,
        PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=Sequence([shared]),
    )
    image, turned = load_image(path, slice=1)
    assert turned.flip_x
    assert bright_box(image[:, ::-1]) == BOX
    assert image[0, -1, 0] == round(255 * ((-800 + 0.5) / 1999 + 0.5))
    assert load_image(path, slice=0)[0].max() == round(255 * ((0 + 0.5) / 1999 + 0.5))


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"PhotometricInterpretation": None}, "photometric interpretation is none"),
        ({"Rows": None}, "has no attribute 'Rows'|Rows"),
        ({"BitsAllocated": None}, "Bits Allocated"),
        ({"SamplesPerPixel": 3}, "3 samples per pixel do not fit"),
        ({"RescaleSlope": 0, "RescaleIntercept": 3}, "rescale slope is 0"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels. Allowed"),
        ({"NumberOfFrames": 10**9}, "has 1000000000 frames and none is chosen"),
    ],
)
def test_headers_that_make_no_sense_are_named(tmp_path: Path, tags: dict[str, Any], said: str) -> None:
    with pytest.raises(UmedError, match=rf"a\.dcm.*({said})"):
        load_image(write_dicom_as(tmp_path / "a.dcm", RAMP, ExplicitVRLittleEndian, **tags))


def test_presets_are_for_ct(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), Modality="MR")
    with pytest.raises(UmedError, match=r"'lung' is in Hounsfield units.*not a CT"):
        load_image(path, window="lung")
    assert bright_box(load_image(path, window="full")[0]) == BOX


def test_three_windows_are_three_channels(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), orientation=[-1, 0, 0, 0, 1, 0])
    windows = ["lung", (-1000.0, 0.0), "bone"]
    image, turned = load_image(path, window=windows)
    assert turned.flip_x
    for channel, window in enumerate(windows):
        np.testing.assert_array_equal(image[:, :, channel], load_image(path, window=window)[0][:, :, 0])
    assert len({image[-1, 0, channel] for channel in range(3)}) == 3
    with pytest.raises(UsageError, match="is not a window. Allowed: a name"):
        load_image(path, window=["lung", "bone"])
