"""All files that come with pydicom: decoded as an independent reading has them, or refused with the reason; none crashes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGLSLossless

from umed_plugin.data.images import load_image, read_stored
from umed_plugin.errors import UmedError

ROOT = Path(pydicom.data.__file__).parent
FILES = ROOT / "test_files"
NO_DICOM = (".py", ".pyc", ".json", ".txt", ".dump", ".icc", ".md", ".gz")
ALL = sorted(
    path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in NO_DICOM and path.name != "README"
)


def frame_of(path: Path) -> Optional[int]:
    """0 where there are several frames."""
    frames = getattr(pydicom.dcmread(path, force=True, stop_before_pixels=True), "NumberOfFrames", None)
    return 0 if str(frames or 1) not in ("1", "None") else None


def test_there_are_as_many_as_we_think() -> None:
    """So that a folder that moved does not pass as nothing to do."""
    assert len(ALL) > 150


# name -> the reason, in our words or those of pydicom.
REFUSED = {
    "GDCMJ2K_TextGBR.dcm": "broken data stream",
    "JPEG-lossy.dcm": "12-bit precision",
    "JPGExtended.dcm": "12-bit precision",
    "JPEG2000-embedded-sequence-delimiter.dcm": "exceeds limit",
    "JPEGLSNearLossless_08.dcm": "compressed as JPEG-LS.*no decoder is installed.*pyjpegls",
    "JPEGLSNearLossless_16.dcm": "compressed as JPEG-LS.*no decoder is installed.*pyjpegls",
    "MR_small_jpeg_ls_lossless.dcm": "compressed as JPEG-LS.*no decoder is installed.*pyjpegls",
    "SC_rgb_jls_lossy_line.dcm": "compressed as JPEG-LS.*no decoder is installed.*pyjpegls",
    "SC_rgb_jls_lossy_sample.dcm": "compressed as JPEG-LS.*no decoder is installed.*pyjpegls",
    "SC_rgb_jpeg_gdcm.dcm": "compressed as JPEG Lossless.*no decoder is installed.*pylibjpeg",
    "MR_truncated.dcm": r"less than expected \(8130 vs 8192 bytes\)",
    "badVR.dcm": "'1A'",
    "meta_missing_tsyntax.dcm": "photometric interpretation is none",
    "nested_priv_SQ.dcm": "photometric interpretation is none",
}


DECODED_BY_PLUGINS = [name for name, reason in REFUSED.items() if "installed" in reason or "12-bit" in reason] + [
    "GDCMJ2K_TextGBR.dcm"
]


@pytest.mark.llava
@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_shown_or_refused_with_a_reason(path: Path) -> None:
    header = pydicom.dcmread(path, force=True)
    refusal = REFUSED.get(
        path.name, None if "PixelData" in header else "no pixels in it|neither a known file extension"
    )
    if refusal is None:
        image, turned = load_image(path, slice=frame_of(path), window="full")
        width, height = turned.size
        assert image.shape == (height, width, 3)
        assert sorted(turned.turned_size) == sorted((header.Columns, header.Rows))
        assert image.min() < image.max()
        return
    try:
        load_image(path, slice=frame_of(path))
    except UmedError as error:
        assert path.name in str(error)
        assert re.search(refusal, str(error))
    else:
        # A decoder that this environment has and ours does not: what it decodes is compared below.
        assert path.name in DECODED_BY_PLUGINS


def test_jpeg_ls_where_a_decoder_is_installed() -> None:
    """With `pyjpegls` or `pylibjpeg` beside pydicom the file is the uncompressed one."""
    if not get_decoder(JPEGLSLossless).is_available:
        pytest.skip("no decoder for JPEG-LS is installed")
    np.testing.assert_array_equal(stored("MR_small_jpeg_ls_lossless.dcm"), stored("MR_small.dcm"))


def stored(name: str, **options: Any) -> np.ndarray:
    return read_stored(FILES / name, **options).values


@pytest.mark.llava
@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_padded.dcm"),
    ],
)
def test_the_same_picture_in_several_syntaxes(name: str) -> None:
    """Against the bytes of the uncompressed file as numpy alone reads them."""
    plain = pydicom.dcmread(FILES / "MR_small.dcm")
    expected = np.frombuffer(plain.PixelData, "<i2").reshape(64, 64)
    np.testing.assert_array_equal(stored("MR_small.dcm"), expected)
    np.testing.assert_array_equal(stored(name), expected)


@pytest.mark.llava
@pytest.mark.parametrize("name", ["rtdose_expb.dcm", "rtdose_rle.dcm"])
def test_frames_of_the_same_dose_in_several_syntaxes(name: str) -> None:
    plain = pydicom.dcmread(FILES / "rtdose.dcm")
    expected = np.frombuffer(plain.PixelData, "<u4").reshape(15, 10, 10)
    for frame in (0, 7, 14):
        np.testing.assert_array_equal(stored(name, slice=frame), expected[frame])
        np.testing.assert_array_equal(stored("rtdose.dcm", slice=frame), expected[frame])


@pytest.mark.llava
def test_a_segmentation_of_single_bits() -> None:
    plain = pydicom.dcmread(FILES / "liver_1frame.dcm")
    bits = np.unpackbits(np.frombuffer(plain.PixelData, np.uint8), bitorder="little")[: 512 * 512].reshape(512, 512)
    np.testing.assert_array_equal(stored("liver_1frame.dcm"), bits)
    np.testing.assert_array_equal(stored("liver_expb_1frame.dcm"), bits)


# Row -> colour of pydicom's bars, as its README has them.
BARS = {
    5: (255, 0, 0),
    15: (255, 128, 128),
    25: (0, 255, 0),
    35: (128, 255, 128),
    45: (0, 0, 255),
    55: (128, 128, 255),
    65: (0, 0, 0),
    75: (64, 64, 64),
    85: (192, 192, 192),
    95: (255, 255, 255),
}


@pytest.mark.llava
@pytest.mark.parametrize(
    "name",
    [
        *("SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_gdcm_KY.dcm"),
        *("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+n2.dcm"),
        *("SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm"),
        *("SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "SC_ybr_full_422_uncompressed.dcm"),
    ],
)
def test_colour_bars_have_their_colours(name: str) -> None:
    image, _ = load_image(FILES / name)
    for row, colour in BARS.items():
        # Half a step of Cb is 0.9 of blue, and chroma was rounded when these were written.
        assert np.abs(image[row, 50].astype(int) - colour).max() <= 5, (row, image[row, 50])


@pytest.mark.llava
def test_frames_in_colour() -> None:
    """The second frame is the first with its colours inverted."""
    for name in ("SC_rgb_rle_2frame.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit_2frame.dcm"):
        first, second = (load_image(FILES / name, slice=frame)[0] for frame in (0, 1))
        np.testing.assert_array_equal(second, 255 - first)


@pytest.mark.llava
@pytest.mark.parametrize("name", ["examples_ybr_color.dcm", "examples_jpeg2k.dcm", "693_J2KI.dcm"])
def test_compressed_pictures_are_what_pil_makes_of_their_stream(name: str) -> None:
    header = pydicom.dcmread(FILES / name)
    frames = list(generate_frames(header.PixelData, number_of_frames=int(getattr(header, "NumberOfFrames", 1) or 1)))
    index = len(frames) - 1
    theirs = np.asarray(Image.open(io.BytesIO(frames[index])))
    ours = read_stored(FILES / name, slice=index if index else None).values
    if ours.ndim == 3:
        # Where chroma is halved, decoders differ in how they fill it up at edges.
        assert np.abs(ours.astype(int) - theirs).mean() <= 1
        return
    # PIL adds 32768 to a stream with a sign; the rescale takes 1024 off; padding is no measurement.
    expected = theirs.astype(float) - 32768 + header.RescaleIntercept
    padded = expected == header.PixelPaddingValue + header.RescaleIntercept
    assert padded.any()
    np.testing.assert_array_equal(ours, np.where(padded, np.nan, expected))


@pytest.mark.llava
def test_a_jpeg_and_the_file_that_another_tool_decompressed() -> None:
    ours = load_image(FILES / "SC_rgb_jpeg.dcm")[0].astype(int)
    assert np.abs(ours - load_image(FILES / "SC_rgb_jpeg_dcmd.dcm")[0]).max() <= 2


@pytest.mark.llava
def test_a_palette_by_hand() -> None:
    header = pydicom.dcmread(FILES / "examples_palette.dcm")
    index = np.frombuffer(header.PixelData, np.uint8)[: 350 * 800].reshape(350, 800)
    names = [f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")]
    tables = [np.frombuffer(getattr(header, name), "<u2") for name in names]
    expected = np.stack([np.rint(table[index] / 65535 * 255) for table in tables], axis=2)
    np.testing.assert_array_equal(load_image(FILES / "examples_palette.dcm")[0], expected)


@pytest.mark.llava
def test_monochrome1_and_its_window_by_hand() -> None:
    path = FILES / "dicomdirtests" / "77654033" / "CR1" / "6154"
    header = pydicom.dcmread(path)
    assert header.PhotometricInterpretation == "MONOCHROME1"
    values = np.frombuffer(header.PixelData, "<u2").reshape(16, 16) * 0.684 + 200
    centre, width = float(header.WindowCenter), float(header.WindowWidth)
    expected = 255 - np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * 255
    assert np.abs(load_image(path)[0][:, :, 0] - expected).max() <= 0.51
