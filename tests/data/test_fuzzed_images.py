"""Headers made up by hypothesis: an image or our own error comes out, never another exception, a hang, or memory without end."""

from __future__ import annotations

import gzip
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from support.drawn import scene, write_dicom, write_dicom_as, write_nifti
from support.fuzzed_images import KINDS, outcomes

from umed_plugin.data.images import load_image
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.llava  # images are read through MONAI, which needs torch

# More memory than at the start, at any moment. Nothing that a few kilobytes claim may come near it.
MOST_KILOBYTES = 300 * 2**10
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def dicoms(folder: Path) -> list[bytes]:
    """The same picture in several syntaxes, as the bytes of its file."""
    import pydicom

    values = np.rint(scene(width=16, height=12, box=(3, 2, 9, 7)) * 1000).astype(np.int16)
    syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
    found = [write_dicom_as(folder / "a.dcm", values, syntax).read_bytes() for syntax in syntaxes]
    found.append(write_dicom(folder / "a.dcm", scene(), WindowCenter=[1, 2], WindowWidth=[3, 4]).read_bytes())
    header = pydicom.dcmread(write_dicom_as(folder / "a.dcm", values, ExplicitVRLittleEndian))
    header.compress(RLELossless)
    header.save_as(folder / "a.dcm")
    return [*found, (folder / "a.dcm").read_bytes()]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(folder: Path) -> Any:
    """The most that this process ever held, before and after; libraries are loaded first."""
    for path in (write_dicom(folder / "a.dcm", scene()), write_nifti(folder / "a.nii", np.ones((4, 4, 1)), np.eye(4))):
        load_image(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES


def open_it(path: Path, **options: Any) -> None:
    """Shown as it should be, or refused by our own error that names the file."""
    try:
        image, turned = load_image(path, **options)
    except UmedError as error:
        assert path.name in str(error)
    else:
        assert image.dtype == np.uint8
        assert image.shape == (*turned.size[::-1], 3)


def mutated(data: st.DataObject, content: bytes, header_bytes: int) -> bytes:
    """Some bytes changed, most of them in the header, and perhaps an end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 12))):
        places = st.one_of(st.integers(0, min(header_bytes, len(changed)) - 1), st.integers(0, len(changed) - 1))
        changed[data.draw(places)] = data.draw(st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255)))
    return bytes(changed[: data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_dicom_bytes(folder: Path, dicoms: list[bytes], data: st.DataObject) -> None:
    path = folder / "fuzzed.dcm"
    path.write_bytes(mutated(data, data.draw(st.sampled_from(dicoms)), 900))
    open_it(path, slice=data.draw(st.sampled_from([None, 0, 3])))


WORDS = st.one_of(st.integers(0, 65535), st.sampled_from([0, 1, 8, 16, 32, 65535]))
TEXTS = st.sampled_from(
    ["LINEAR", "SIGMOID", "?", "", "RGB", "MONOCHROME1", "PALETTE COLOR", "YBR_FULL_422", "CT", "MR"]
)
NUMBERS = st.sampled_from(
    ["0", "1", "-1", "1e308", "-1e308", "1e-300", "nan", "inf", "7.5", "", "1\\2\\3", "999999999"]
)
ELEMENTS: dict[str, Any] = {
    **dict.fromkeys(["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel"], WORDS),
    **dict.fromkeys(["PixelRepresentation", "PlanarConfiguration", "PixelPaddingValue"], WORDS),
    **dict.fromkeys(["PhotometricInterpretation", "VOILUTFunction", "Modality"], TEXTS),
    **dict.fromkeys(["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "NumberOfFrames"], NUMBERS),
    "ImageOrientationPatient": st.lists(NUMBERS, max_size=7).map("\\".join),
}


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(
    chosen=st.dictionaries(st.sampled_from(sorted(ELEMENTS)), st.data(), max_size=5),
    frame=st.sampled_from([None, 0, 1]),
    which=st.integers(0, 4),
)
def test_dicom_elements(folder: Path, dicoms: list[bytes], chosen: Any, frame: Any, which: int) -> None:
    """Values that are whole in form and make no sense: written without pydicom's checks."""
    import pydicom
    from pydicom import config

    path = folder / "elements.dcm"
    path.write_bytes(dicoms[which])
    before = config.settings.reading_validation_mode, config.settings.writing_validation_mode
    config.settings.reading_validation_mode = config.settings.writing_validation_mode = config.IGNORE
    try:
        header = pydicom.dcmread(path)
        for name, drawer in chosen.items():
            value = drawer.draw(ELEMENTS[name])
            tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(name))
            vr = pydicom.datadict.dictionary_VR(tag).split(" ")[0]
            element = pydicom.dataelem.DataElement(tag, "LO" if isinstance(value, str) else vr, value)
            if isinstance(value, str):
                element.VR = vr if vr in ("CS", "LO") else "LO"
            header[tag] = element
        header.save_as(path)
    finally:
        config.settings.reading_validation_mode, config.settings.writing_validation_mode = before
    open_it(path, slice=frame, window=("file" if frame is None else "full"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@FUZZ
@given(data=st.data())
def test_nifti_bytes(folder: Path, ending: str, data: st.DataObject) -> None:
    path = folder / f"fuzzed.{ending}"
    volume = np.stack([scene(width=16, height=12, box=(3, 2, 9, 7))] * 4, axis=2)
    whole = write_nifti(folder / "whole.nii", volume, np.eye(4)).read_bytes()
    content = mutated(data, whole, 352)
    # Lengths of axes, type, scaling and offset: what decides how much is read.
    if data.draw(st.booleans()):
        content = bytearray(content.ljust(352, b"\0"))
        field, size = data.draw(st.sampled_from([(40, 16), (70, 4), (108, 12), (280, 48)]))
        content[field : field + size] = data.draw(st.binary(min_size=size, max_size=size))
        content = bytes(content)
    path.write_bytes(gzip.compress(content, 1) if ending == "nii.gz" else content)
    open_it(
        path,
        slice=data.draw(st.sampled_from([None, 0, 2])),
        slice_axis=data.draw(st.integers(0, 2)),
        volume=data.draw(st.sampled_from([None, 0])),
    )


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(content=st.binary(max_size=400), ending=st.sampled_from(["dcm", "nii", "nii.gz", "png", "jpg", "tif", ""]))
def test_anything_at_all(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"any.{ending}"
    path.write_bytes(content)
    open_it(path, slice=0)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_header_that_claims_terabytes(tmp_path: Path, ending: str) -> None:
    header = bytearray(write_nifti(tmp_path / "a.nii", np.zeros((4, 4, 4)), np.eye(4)).read_bytes())
    header[40:56] = np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], "<i2").tobytes()
    path = tmp_path / f"huge.{ending}"
    path.write_bytes(gzip.compress(bytes(header)) if ending == "nii.gz" else bytes(header))
    with pytest.raises(UmedError, match="more than the file can hold"):
        load_image(path, slice=0)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_of_every_format(folder: Path, kind: str) -> None:
    found = outcomes(kind, 60, folder)
    assert sum(found.values()) == 60
    assert found["refused"] > 0
