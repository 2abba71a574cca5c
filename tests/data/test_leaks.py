"""Pictures in two places: copies are found however they were saved, other pictures are not taken for copies."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import write_dicom, write_nifti, write_recipe
from support.source_files import uneven

from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.images import load_image
from umed_plugin.data.leaks import Pictures, evaluation_pictures, thumbprint
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack


def picture(seed: int, height: int = 300, width: int = 420) -> np.ndarray:
    return np.repeat(uneven(height, width, seed).astype(np.uint8)[:, :, None], 3, axis=2)


def resaved(shown: np.ndarray, size: tuple[int, int], quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(shown).resize(size).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    "changed",
    [
        lambda shown: shown,
        lambda shown: resaved(shown, (210, 150), 60),
        lambda shown: resaved(shown, (512, 512), 30),
        lambda shown: shown[:, ::-1],
        np.rot90,
        lambda shown: np.rot90(shown[::-1], 3),
        lambda shown: (shown * 0.6 + 40).astype(np.uint8),
    ],
    ids=["the same", "smaller", "another shape", "mirrored", "turned", "mirrored and turned", "paler"],
)
def test_a_copy_is_found(changed) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = Pictures(), Pictures()
    for seed in range(20):
        theirs.add(f"theirs {seed}", picture(seed))
        ours.add(f"ours {seed}", np.ascontiguousarray(changed(picture(seed))) if seed == 7 else picture(100 + seed))
    (leak,) = ours.also_in(theirs)
    assert (leak.name, leak.other) == ("ours 7", "theirs 7")
    assert leak.likeness > 0.97


def test_pictures_of_one_grey_are_like_nothing() -> None:
    grey = Pictures()
    grey.add("grey", np.full((50, 60, 3), 80, np.uint8))
    assert not thumbprint(np.zeros((9, 9, 3), np.uint8)).any()
    assert grey.also_in(grey) == []
    assert Pictures().also_in(grey) == grey.also_in(Pictures()) == []


@pytest.mark.llava
def test_real_pictures_are_told_apart_and_copies_found(real_data: Path) -> None:
    """CT, MRI and endoscopy: halved and saved as JPEG anew, each is like itself and no other patient's."""
    ours, copies = Pictures(), Pictures()
    patients, shown = {}, {}
    files = sorted((real_data / "deeplesion" / "liver_flat").iterdir())
    files += sorted((real_data / "kvasir_seg" / "images").iterdir())
    files += sorted((real_data / "brain_tumor_coco").rglob("*.jpg"))[::4]
    for file in files:
        pixels, _ = load_image(file, offset=32768, window=(-175.0, 275.0))
        name = file.name[:6] if file.parent.name == "liver_flat" else file.name.split("_jpg")[0]
        # The data set has one patient under two numbers, as its pictures show.
        patients[str(file)] = {"133": "65"}.get(name, name)
        shown[str(file)] = pixels
        ours.add(str(file), pixels)
        copies.add(str(file), resaved(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), 60))
    leaks = ours.also_in(copies)
    assert len(leaks) == len(files)
    assert min(leak.likeness for leak in leaks) > 0.98
    assert all(patients[leak.name] == patients[leak.other] for leak in leaks)
    for patient in sorted(set(patients.values()))[::3]:
        one, rest = Pictures(), Pictures()
        for file in files:
            (one if patients[str(file)] == patient else rest).add(str(file), shown[str(file)])
        assert one.also_in(rest) == []


@pytest.mark.llava
def test_evaluation_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    Image.fromarray(picture(3)).save(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    (tmp_path / "imgs" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "imgs" / "notes.txt").write_text("no image")
    found = evaluation_pictures([tmp_path / "imgs"])
    assert found.names == [str(tmp_path / "imgs" / "xmlab1" / "source.jpg")]
    warning = capsys.readouterr().err
    assert "umed: warning: not compared with the training data: " in warning
    assert "broken.png" in warning
    with pytest.raises(UmedError, match="nowhere: not a folder with images in it or below"):
        evaluation_pictures([tmp_path / "nowhere"])


@pytest.mark.llava
def test_links_to_folders_of_an_evaluation_set_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "disk" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    assert evaluation_pictures([tmp_path / "set"]).names == [str(tmp_path / "set" / "images" / "a.png")]


@pytest.mark.llava
def test_every_kind_of_image_of_an_evaluation_set_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.webp", "b.gif"):
        Image.fromarray(picture(1)).save(tmp_path / name)
    for name in ("c.dicom", "IM0001"):
        write_dicom(tmp_path / name, picture(2)[:, :, 0] / 255)
    write_nifti(tmp_path / "v.nii.gz", np.stack([picture(3)[:, :, 0], picture(4)[:, :, 0]], axis=2) / 255, np.eye(4))
    (tmp_path / "d.jp2").write_bytes(b"x")
    (tmp_path / "e.png").symlink_to("nowhere")
    found = evaluation_pictures([tmp_path])
    names = ["IM0001", "a.webp", "b.gif", "c.dicom", "v.nii.gz#0", "v.nii.gz#1"]
    assert [Path(name).name for name in found.names] == names
    assert found.has(picture(1))
    told = capsys.readouterr().err
    assert "files that are no images by their names are not compared with the training data: .jp2 (1)" in told
    assert "e.png: is a link to nowhere, which is not there" in told


@pytest.mark.llava
def test_a_volume_is_compared_along_the_axis_that_the_recipe_slices(tmp_path: Path) -> None:
    (tmp_path / "evaluated").mkdir()
    volume = np.random.default_rng(0).uniform(size=(6, 12, 12)).repeat(8, 0).repeat(4, 1).repeat(4, 2)
    write_nifti(tmp_path / "evaluated" / "v.nii.gz", volume, np.eye(4))
    write_nifti(tmp_path / "v.nii.gz", volume, np.eye(4))
    (tmp_path / "a.csv").write_text('file,box,lesion,slice\nv.nii.gz,"4, 4, 20, 20",nod,20\n')
    reader = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, slice: slice}}"
    recipe = load_recipe(
        write_recipe(tmp_path, reader, "{by: patient, fractions: {train: 1}}", "image: {slice_axis: 0}\n")
    )
    against = [tmp_path / "evaluated"]
    (leak,) = check_recipe(recipe, against=against).evaluation_leaks or []
    assert leak.name == "train: drawn/v.nii.gz#20" and "evaluated/v.nii.gz#" in leak.other
    with pytest.raises(UmedError, match="no images under"):  # its only one is left out
        build_records(recipe, out_dir=tmp_path / "out", against=against)
    both = evaluation_pictures(against, {0, 2}).names
    assert both[0].endswith("v.nii.gz#0 along axis 0") and both[-1].endswith("v.nii.gz#47 along axis 2")
