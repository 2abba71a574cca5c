"""Every reader on images that are neither square nor symmetric: the bright rectangle ends up under its box."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.drawn import BOX, HEIGHT, WIDTH, bright_box, scene, write_dicom, write_nifti, write_png, write_png16

from umed_plugin.data.images import load_image, read_by_llava
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.geometry import Orientation


@pytest.mark.llava
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA"])
def test_8_bit_png_is_what_llava_reads(tmp_path: Path, mode: str) -> None:
    path = write_png(tmp_path / "a.png", scene(), mode)
    image, turned = load_image(path, window="lung")
    assert turned == Orientation(WIDTH, HEIGHT)
    assert bright_box(image) == BOX
    np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))
    assert read_by_llava(path)


@pytest.mark.llava
def test_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.uint8(scene() * 255)).save(path, quality=95)
    assert bright_box(load_image(path)[0]) == BOX
    assert read_by_llava(path)


@pytest.mark.llava
def test_16_bit_png_with_offset_and_window(tmp_path: Path) -> None:
    """0.1, 0.4 and 1.0 are -800, -200 and 1000 HU; the window from -1000 to 0 shows them as 0.2, 0.8 and white."""
    path = write_png16(tmp_path / "a.png", scene())
    image, _ = load_image(path, offset=32768, window=(-1000.0, 0.0))
    assert image.dtype == np.uint8
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert bright_box(image, 210) == BOX
    assert image[0, 0].tolist() == [51] * 3
    assert image[-1, -1].tolist() == [204] * 3
    assert not read_by_llava(path)


@pytest.mark.llava
def test_without_its_offset_everything_is_above_the_window(tmp_path: Path) -> None:
    assert load_image(write_png16(tmp_path / "a.png", scene()), window="abdomen")[0].min() == 255


@pytest.mark.llava
def test_dicom_uses_slope_intercept_and_its_own_first_window(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=["-500", "40"], WindowWidth=["1000", "400"])
    image, turned = load_image(path)
    assert bright_box(image, 210) == BOX
    assert turned == Orientation(WIDTH, HEIGHT)
    assert image[0, 0].tolist() == [51] * 3
    assert image[-1, -1].tolist() == [204] * 3


@pytest.mark.llava
@pytest.mark.parametrize("tags", [{}, {"WindowCenter": "", "WindowWidth": ""}, {"WindowCenter": 40, "WindowWidth": 0}])
def test_dicom_without_window_shows_the_full_range(tmp_path: Path, tags: dict[str, Any]) -> None:
    image, _ = load_image(write_dicom(tmp_path / "a.dcm", scene(), **tags))
    assert (image.min(), image.max()) == (0, 255)
    assert image[-1, -1, 0] == round(255 * 0.3 / 0.9)


@pytest.mark.llava
def test_a_dicom_window_around_zero_is_a_window(tmp_path: Path) -> None:
    image, _ = load_image(write_dicom(tmp_path / "a.dcm", scene(), WindowCenter=0, WindowWidth=4000))
    assert image[0, 0, 0] == round(255 * ((-800 + 0.5) / 3999 + 0.5))


@pytest.mark.llava
def test_dicom_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", 1.1 - scene(), PhotometricInterpretation="MONOCHROME1")
    assert bright_box(load_image(path)[0]) == BOX


@pytest.mark.llava
def test_dicom_without_ending_is_known_by_its_header(tmp_path: Path) -> None:
    assert bright_box(load_image(write_dicom(tmp_path / "IM0001", scene()))[0]) == BOX


@pytest.mark.llava
def test_dicom_frames(tmp_path: Path) -> None:
    frames = np.stack([scene((1, 2, 3, 4)), scene(BOX), scene((50, 20, 60, 50))])
    path = write_dicom(tmp_path / "a.dcm", frames)
    assert bright_box(load_image(path, slice=1)[0]) == BOX
    assert bright_box(load_image(path, slice=2)[0]) == (50, 20, 60, 50)
    with pytest.raises(UmedError, match="has 3 frames and none is chosen"):
        load_image(path)
    with pytest.raises(UmedError, match=r"frame 3 does not exist\. Allowed: 0 to 2"):
        load_image(path, slice=3)


@pytest.mark.llava
def test_dicom_in_colour(tmp_path: Path) -> None:
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[7:19, 11:42] = (200, 90, 30)
    image, _ = load_image(write_dicom(tmp_path / "a.dcm", rgb))
    np.testing.assert_array_equal(image, rgb)


@pytest.mark.llava
def test_dicom_with_unknown_colours_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", scene(), PhotometricInterpretation="CMYK")
    with pytest.raises(UmedError, match=r"CMYK\. Allowed: MONOCHROME1"):
        load_image(path)


# Patient axes L, P, S; the displayed image's x and y grow along these.
PLANES = {"axial": ((1, 0, 0), (0, 1, 0)), "coronal": ((1, 0, 0), (0, 0, -1)), "sagittal": ((0, 1, 0), (0, 0, -1))}


@pytest.mark.llava
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("transpose", "flip_x", "flip_y"), list(itertools.product([False, True], repeat=3)))
def test_dicom_orientations(tmp_path: Path, plane: str, transpose: bool, flip_x: bool, flip_y: bool) -> None:
    """The same patient scanned in all 8 ways looks the same, whichever way its rows and columns run."""
    along_x, along_y = (np.array(axis) for axis in PLANES[plane])
    stored = scene()
    if flip_x:
        stored, along_x = stored[:, ::-1], -along_x
    if flip_y:
        stored, along_y = stored[::-1], -along_y
    if transpose:
        stored, along_x, along_y = stored.T, along_y, along_x
    path = write_dicom(tmp_path / "a.dcm", np.ascontiguousarray(stored), orientation=[*along_x, *along_y])
    image, turned = load_image(path)
    assert bright_box(image) == BOX
    assert image[-1, -1, 0] > image[0, 0, 0]
    as_stored, untouched = load_image(path, orientation="as_stored")
    assert untouched.size == as_stored.shape[1::-1] == stored.shape[::-1]
    assert turned.apply_boxes([bright_box(as_stored)]) == [BOX]


@pytest.mark.llava
def test_slightly_tilted_slices_are_turned_like_straight_ones(tmp_path: Path) -> None:
    tilted = [-0.98, 0.17, 0.05, -0.17, -0.97, 0.15]
    path = write_dicom(tmp_path / "a.dcm", scene()[::-1, ::-1], orientation=tilted)
    assert bright_box(load_image(path)[0]) == BOX


ORIENTATIONS = [
    "".join(code) for order in itertools.permutations(["LR", "PA", "SI"]) for code in itertools.product(*order)
]


@pytest.mark.llava
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_nifti_in_all_48_orientations(tmp_path: Path, codes: str) -> None:
    """Nibabel itself writes the same axial slice in every orientation there is; it must look the same."""
    import nibabel
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    # RAS: the first axis runs to the patient's right, which is the image's left, the second to the front, which is up.
    ras = np.full((WIDTH, HEIGHT, 5), 0.1)
    ras[:, :, 2] = scene()[::-1, ::-1].T
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = apply_orientation(ras, transform)
    affine = np.diag([0.7, 0.7, 3, 1]) @ inv_ornt_aff(transform, ras.shape)
    assert "".join(nibabel.aff2axcodes(affine)) == codes
    path = write_nifti(tmp_path / "a.nii.gz", stored, affine)
    axis = next(i for i, code in enumerate(codes) if code in "SI")
    image, turned = load_image(path, slice=2, slice_axis=axis)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert bright_box(image) == BOX
    assert image[-1, -1, 0] > image[0, 0, 0]
    as_stored, _ = load_image(path, slice=2, slice_axis=axis, orientation="as_stored")
    assert turned.apply_boxes([bright_box(as_stored)]) == [BOX]


@pytest.mark.llava
@pytest.mark.parametrize(("axis", "name"), [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_nifti_slice_axes(tmp_path: Path, axis: int, name: str) -> None:
    """Head or front up; the front on the left in a sagittal slice, the patient's right there in the others."""
    shape = [4, 4, 4]
    first, second = (i for i in range(3) if i != axis)
    shape[first], shape[second] = WIDTH, HEIGHT
    ras = np.full(shape, 0.1)
    np.moveaxis(ras, axis, 2)[:, :, 3] = scene()[::-1, ::-1].T
    path = write_nifti(tmp_path / "a.nii", ras, np.eye(4))
    assert bright_box(load_image(path, slice=3, slice_axis=axis)[0]) == BOX
    with pytest.raises(UmedError, match=r"slice 4 does not exist\. Allowed: 0 to 3"):
        load_image(path, slice=4, slice_axis=axis)


@pytest.mark.llava
def test_nifti_as_stored_has_its_first_axis_to_the_right(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", scene().T[:, :, None], np.eye(4))
    image, turned = load_image(path, orientation="as_stored")
    assert bright_box(image) == BOX
    assert turned == Orientation(WIDTH, HEIGHT)


@pytest.mark.llava
def test_nifti_volume_needs_a_slice(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((8, 7, 6)), np.eye(4))
    with pytest.raises(UmedError, match="has 6 slices and none is chosen"):
        load_image(path)


@pytest.mark.llava
def test_a_changed_volume_is_read_again(tmp_path: Path) -> None:
    """The last volume is kept in memory; a file written anew under the same name must not be mixed up with it."""
    path = write_nifti(tmp_path / "a.nii", scene().T[:, :, None], np.eye(4))
    load_image(path)
    other = scene((50, 20, 60, 50))
    write_nifti(path, other.T[:, :, None], np.eye(4))
    assert bright_box(load_image(path, orientation="as_stored")[0]) == (50, 20, 60, 50)


@pytest.mark.llava
def test_windows(tmp_path: Path) -> None:
    path = write_png16(tmp_path / "a.png", scene(), offset=32768)
    by_preset = load_image(path, offset=32768, window="lung")[0]
    np.testing.assert_array_equal(by_preset, load_image(path, offset=32768, window=(-1350.0, 150.0))[0])
    with pytest.raises(UsageError, match="Did you mean 'lung'"):
        load_image(path, window="lnug")


@pytest.mark.llava
def test_an_even_image_does_not_divide_by_zero(tmp_path: Path) -> None:
    assert load_image(write_png16(tmp_path / "a.png", np.zeros((5, 4))))[0].max() == 0


@pytest.mark.llava
def test_infinite_and_missing_values_are_shown_black(tmp_path: Path) -> None:
    import nibabel

    volume = scene().T[:, :, None].astype(np.float32)
    volume[0, 0], volume[0, 1] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii")
    image, _ = load_image(tmp_path / "a.nii", orientation="as_stored")
    assert image[0, 0, 0] == image[1, 0, 0] == 0
    assert bright_box(image) == BOX


@pytest.mark.llava
@pytest.mark.parametrize("ending", ["png", "jpg", "dcm", "nii", "nii.gz"])
@pytest.mark.parametrize("content", [b"", b"not an image at all" * 20])
def test_damaged_files_are_named(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    with pytest.raises(UmedError, match=rf"bad\.{ending}: cannot be read as an image \(.*{len(content)} bytes"):
        load_image(path)


@pytest.mark.llava
@pytest.mark.parametrize("ending", ["png", "jpg", "dcm", "nii", "nii.gz"])
def test_files_cut_off_are_named(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH))
    path = tmp_path / f"cut.{ending}"
    if ending == "dcm":
        write_dicom(path, noise)
    elif ending.startswith("nii"):
        write_nifti(path, noise.T[:, :, None], np.eye(4))
    else:
        Image.fromarray(np.uint8(noise * 255)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UmedError, match=rf"cut\.{ending}: cannot be read"):
        load_image(path)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(UmedError, match="no such image file"):
        load_image(tmp_path / "a.png")
    (tmp_path / "a.xyz").write_bytes(b"12345")
    with pytest.raises(UmedError, match=r"has neither a known file extension nor a DICOM header. Allowed: \.png"):
        load_image(tmp_path / "a.xyz")
