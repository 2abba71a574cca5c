"""Windows that are not for their images: CT presets where the modality is another, and whatever leaves black and white alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import scene, write_dicom, write_nifti, write_png, write_png16, write_recipe

from umed_plugin.commands.recipe.check_page import write_report
from umed_plugin.data.checking.check import RecipeCheck, check_recipe, share_at_ends
from umed_plugin.data.checking.gallery import MOST
from umed_plugin.data.checking.plausibility import plausibility
from umed_plugin.data.images import show_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.errors import UmedError

CSV = "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c, slice: s%s}}"
FINDING = "images of which over 95 % is black or white"


def written(folder: Path, ending: str) -> str:
    """A picture of -1000 to 1000, with a slice if the format needs one; returns its row of the CSV."""
    path = folder / f"one.{ending}"
    if ending == "dcm":
        write_dicom(path, scene())
    elif ending.startswith("nii"):
        write_nifti(path, (scene().T * 2 - 1)[:, :, None], np.eye(4))
    elif ending == "png":
        write_png16(path, scene(), offset=32768)
    else:
        Image.fromarray((scene() * 2000 - 1000 + 32768).astype(np.uint16)).save(path)
    return f"one.{ending},11,7,42,19,nod,{'0' if ending.startswith('nii') else ''}\n"


def recipe_of(folder: Path, rows: str, image: str, modality: str = "CT", columns: str = "") -> Path:
    (folder / "a.csv").write_text(f"f,x1,y1,x2,y2,c,s{',m' if columns else ''}\n{rows}")
    path = write_recipe(folder, CSV % columns, extra=f"image: {image}\n")
    path.write_text(path.read_text().replace("modality: CT", f"modality: {modality}"))
    return path


def checked(recipe: Path) -> RecipeCheck:
    return check_recipe(load_recipe(recipe), most_shown=MOST)


@pytest.mark.llava
@pytest.mark.parametrize("ending", ["dcm", "nii", "nii.gz", "png", "tif"])
def test_an_image_that_its_window_leaves_black_and_white_is_a_finding(ending: str, tmp_path: Path) -> None:
    """Of every format that goes through a window: above it all is white, and within it nothing is."""
    rows = written(tmp_path, ending)
    offset = ", offset: 32768" if ending in ("png", "tif") else ""
    check = checked(recipe_of(tmp_path, rows, f"{{window: {{low: -3000, high: -2000}}{offset}}}"))
    (found,) = [row for row in plausibility(check) if row.what.startswith(FINDING)]
    assert (found.count, found.of) == (1, 1) and f"one.{ending}" in found.examples[0]
    assert check.ok, "it is said, and does not stop a build"
    assert check.images_shown.cards[0]["findings"] == ["black or white"]
    page = write_report(check, tmp_path / "page").read_text()
    assert FINDING in page and "windows that leave black and white alone" in page
    check = checked(recipe_of(tmp_path, rows, f"{{window: {{low: -1200, high: 1100}}{offset}}}"))
    assert not [row for row in plausibility(check) if row.what.startswith(FINDING)] and check.windowed == 1


@pytest.mark.llava
def test_a_16_bit_picture_without_its_offset_is_a_finding(tmp_path: Path) -> None:
    check = checked(recipe_of(tmp_path, written(tmp_path, "png"), "{window: lung}"))
    assert any(row.what.startswith(FINDING) for row in plausibility(check))


def test_pictures_of_eight_bits_have_no_window_to_be_wrong(tmp_path: Path) -> None:
    write_png(tmp_path / "one.png", np.round(scene()))
    check = checked(recipe_of(tmp_path, "one.png,11,7,42,19,nod,\n", "{}"))
    assert check.windowed == 0 and check.black_or_white == []


def test_the_share_counts_pixels_that_are_at_an_end_in_all_channels() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    assert share_at_ends(pixels) == 1
    pixels[0, 0] = (0, 255, 255)
    pixels[0, 1] = (0, 7, 255)
    assert share_at_ends(pixels) == 0.75


@pytest.mark.parametrize("window", ["lung", "[lung, bone, file]", "[file, full, {low: 0, high: 9}]"])
@pytest.mark.parametrize("modality", ["MRI", "X-ray", "OCT", "PET/CT", "CT", '""'])
def test_a_ct_preset_is_refused_where_the_recipe_is_of_another_modality(
    window: str, modality: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, "", f"{{window: {window}}}", modality)
    if "lung" in window and modality in ("MRI", "X-ray", "OCT"):
        with pytest.raises(UmedError) as refused:
            load_recipe(recipe)
        assert f"image.window: is 'lung', a range in Hounsfield units, and the modality is '{modality}'" in str(
            refused.value
        )
    else:
        load_recipe(recipe)


@pytest.mark.llava
@pytest.mark.parametrize("ending", ["dcm", "nii", "png", "tif"])
def test_where_a_column_names_modalities_each_image_is_asked(ending: str, tmp_path: Path) -> None:
    """An image of eight bits is none of the preset's, whatever its modality is."""
    write_png(tmp_path / "eight.png", scene())
    (tmp_path / "more").mkdir()
    row = written(tmp_path, ending).strip()
    rows = f"{row},MRI\neight.png,11,7,42,19,nod,,MRI\n"
    check = checked(recipe_of(tmp_path, rows, "{window: lung}", columns=", modality: m"))
    (fault,) = check.faults
    assert "a.csv" in fault and "image.window is 'lung'" in fault and "the modality is 'MRI', not CT" in fault
    rows = f"{row},CT\neight.png,11,7,42,19,nod,,MRI\n"
    assert checked(recipe_of(tmp_path, rows, "{window: lung}", "MRI", columns=", modality: m")).ok


@pytest.mark.llava
def test_two_views_side_by_side_have_a_window_if_one_of_them_has(tmp_path: Path) -> None:
    deep, flat = write_png16(tmp_path / "deep.png", scene()), write_png(tmp_path / "flat.png", scene())
    assert not show_image(flat, beside=[deep]).is_grey_levels
    assert show_image(flat, beside=[flat]).is_grey_levels
