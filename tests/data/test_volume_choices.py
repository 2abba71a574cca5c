"""What is left out or chosen of the slices of a volume that becomes one image: the slices are taken together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.drawn import scene, write_nifti

from umed_plugin.data.annotations import Annotated, read_annotations
from umed_plugin.data.annotations.one_image import in_one_image, note_unread
from umed_plugin.data.annotations.phrases import NO_PHRASE
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import Record
from umed_plugin.data.volumes import choose_slices
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
BOX, EMPTY = '"11, 7, 42, 19"', ""
RECIPE = """
name: volumes
description: Drawn volumes.
terms: {licence: CC0, url: "https://example.org"}
annotations:
  reader: csv
  files: a.csv
  columns: {file: file, slice: slice, box: box, lesion: lesion, split: split}
classes: {nodule: {name: nodule}, cyst: {name: cyst}}
split: {by: column}
"""
MONTAGE = "image: {slices: montage, tiles: 9, window: full}\n"
LARGEST = "image: {slices: largest_lesion, window: full}\n"


def write(folder: Path, rows: list[str], extra: str, name: str = "volumes") -> Path:
    """A recipe of volumes of nine slices; ``rows`` are file, slice, box, lesion, split."""
    (folder / "a.csv").write_text("\n".join(["file,slice,box,lesion,split", *rows]) + "\n")
    for file in {row.split(",")[0] for row in rows}:
        write_nifti(folder / file, np.stack([scene().T] * 9, axis=2), np.diag([-0.7, -0.7, 3, 1]))
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE + extra)
    return path


def built(folder: Path, rows: list[str], extra: str) -> list[Record]:
    return build_records(load_recipe(write(folder, rows, extra)), out_dir=folder / "out", data_root=folder)


OTHER = f"b.nii,1,{BOX},cyst,train"


@pytest.mark.llava
def test_a_montage_is_left_out_with_a_slice_that_it_would_show(tmp_path, capsys):
    rows = [f"a.nii,5,{BOX},artefact,train", f"a.nii,2,{EMPTY},,train", OTHER]
    records = built(tmp_path, rows, MONTAGE + "ignore_classes: [artefact]\n")
    assert [Path(record["id"]).name.partition("#")[0] for record in records] == ["b.nii"]
    said = capsys.readouterr().err
    assert "1 images left out (shows a slice of its volume that is left out)" in said


@pytest.mark.llava
def test_a_montage_that_does_not_show_the_slice_is_kept(tmp_path):
    rows = [f"a.nii,0,{BOX},artefact,train", f"a.nii,4,{BOX},cyst,train"]
    few = MONTAGE.replace("tiles: 9", "tiles: 3")
    (record,) = built(tmp_path, rows, few + "ignore_classes: [artefact]\n")
    assert record["provenance"]["slice"] == [1, 4, 7]


@pytest.mark.llava
def test_the_middle_slice_of_a_volume_is_left_out_if_its_lesion_is(tmp_path):
    rows = [f"a.nii,4,{BOX},artefact,train", f"a.nii,,{EMPTY},,train", OTHER]
    (record,) = built(tmp_path, rows, LARGEST + "ignore_classes: [artefact]\n")
    assert record["provenance"]["slice"] == 1
    rows[0] = f"a.nii,5,{BOX},artefact,train"
    assert len(built(tmp_path, rows, LARGEST + "ignore_classes: [artefact]\n")) == 2


@pytest.mark.llava
def test_a_montage_is_left_out_with_a_slice_of_leave_out_images(tmp_path):
    (tmp_path / "a.csv").write_text(
        "file,slice,box,lesion,split,noisy\n"
        f"a.nii,5,{BOX},cyst,train,1\na.nii,2,{BOX},cyst,train,0\nb.nii,2,{BOX},cyst,train,0\n"
    )
    text = RECIPE.replace("  columns:", "  leave_out_images: {noisy: ['1']}\n  columns:") + MONTAGE
    for name in ("a.nii", "b.nii"):
        write_nifti(tmp_path / name, np.stack([scene().T] * 9, axis=2), np.diag([-0.7, -0.7, 3, 1]))
    (tmp_path / "r.yaml").write_text(text)
    (record,) = build_records(load_recipe(tmp_path / "r.yaml"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert "b.nii" in record["id"]


def test_slices_without_a_used_box_are_unread_and_those_without_a_phrase_are_not(tmp_path):
    recipe = load_recipe(write(tmp_path, [OTHER], MONTAGE))
    used, sliver, silent = (Annotated(tmp_path / "b.nii", [], [], "a.csv", slice=k) for k in (1, 2, 3))
    sliver.dropped_boxes, silent.left_out = 1, NO_PHRASE
    note_unread([used], [used, sliver, silent], recipe)
    assert used.unread == {2}


def test_a_volume_is_held_out_as_a_whole_if_one_image_is_made_of_it(tmp_path):
    rows = [f"a.nii,3,{BOX},cyst,train", f"a.nii,6,{BOX},nodule,train", f"b.nii,1,{BOX},cyst,train"]
    rows += [f"c.nii,3,{BOX},cyst,test", f"c.nii,6,{BOX},nodule,test"]
    held = "hold_out: {classes: [nodule]}\n"
    found = read_annotations(load_recipe(write(tmp_path, rows, MONTAGE + held)), tmp_path)
    assert [(i.image.name, i.slice, i.held_out) for i in found.items] == [
        ("b.nii", 1, False),
        ("c.nii", 3, True),
        ("c.nii", 6, True),
    ]
    assert found.left_out == {"held out of train: nodule": 1}
    found = read_annotations(load_recipe(write(tmp_path, rows, held)), tmp_path)
    assert [(i.image.name, i.slice) for i in found.items if i.split == "train"] == [("a.nii", 3), ("b.nii", 1)]


@pytest.mark.llava
@pytest.mark.parametrize("how", [MONTAGE, LARGEST])
def test_a_mixture_chooses_volumes_and_not_their_slices(how, tmp_path, capsys):
    rows = [f"{file},{k},{BOX},cyst,train" for file in ("a.nii", "b.nii", "c.nii", "d.nii") for k in range(4)]
    write(tmp_path, rows, how)
    (tmp_path / "m.yaml").write_text("name: m\ndescription: Volumes.\nsources: {volumes.yaml: {folder: .}}\nsize: 3\n")
    records = build_records(load_recipe(tmp_path / "m.yaml"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert [len(record["objects"]["bbox"]) for record in records] == [4 if how == MONTAGE else 1] * 3
    said = capsys.readouterr().err
    assert "1 images left out (volumes.yaml: above its share)" in said and "wanted" not in said


def test_negatives_of_volumes_are_counted_by_volume(tmp_path):
    rows = [f"a.nii,3,{BOX},cyst,train", f"a.nii,4,{BOX},cyst,train", f"a.nii,0,{EMPTY},,train"]
    rows += [f"{file},{k},{EMPTY},,train" for file in ("b.nii", "c.nii") for k in range(3)]
    recipe = load_recipe(write(tmp_path, rows, MONTAGE + "negatives: {per_positive: 1}\n"))
    found = read_annotations(recipe, tmp_path)
    assert sorted(len(image) for image in in_one_image(found.items)) == [3, 3]
    assert found.left_out == {"negative above negatives.per_positive": 1}
    assert {item.image.name for item in found.normals} == {"b.nii", "c.nii"}, "a volume with a lesion is not normal"


@pytest.mark.llava
def test_a_montage_is_of_one_split(tmp_path):
    rows = [f"a.nii,3,{BOX},cyst,train", f"a.nii,4,{BOX},cyst,test"]
    with pytest.raises(UmedError, match=r"a\.csv:3: puts a slice of a\.nii in test, and .*a\.csv:2 puts one in train"):
        built(tmp_path, rows, MONTAGE)
    assert {record["split"] for record in built(tmp_path, rows, LARGEST)} == {"train", "test"}


@pytest.mark.llava
@pytest.mark.parametrize("how", [MONTAGE, LARGEST])
@pytest.mark.parametrize("kind", ["volume", "pages"])
def test_a_lesion_on_no_slice_is_refused(how, kind, tmp_path):
    """Without a number it would be drawn on the first slice."""
    name = {"volume": "a.nii", "pages": "a.tif"}[kind]
    recipe = write(tmp_path, [f"a.nii,,{BOX},cyst,train", f"a.nii,3,{BOX},cyst,train"], how)
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("a.nii", name))
    pages = [Image.fromarray((scene() * 255).astype(np.uint8))] * 9
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UmedError, match=rf"a\.csv:2: .*{name} has 9 slices and none is chosen.* columns\.slice"):
        build_records(load_recipe(recipe), out_dir=tmp_path / "out", data_root=tmp_path)


@pytest.mark.llava
def test_a_montage_is_shown_in_the_window_of_its_lesions(tmp_path):
    """The first row is mostly of a slice without a lesion, and has none."""
    recipe = write(tmp_path, [OTHER], MONTAGE.replace("full", "column"))
    recipe.write_text(recipe.read_text().replace("split: split}", "split: split, window: window}"))

    def chosen(*rows: str) -> tuple[list[Annotated], list[UmedError]]:
        (tmp_path / "a.csv").write_text("\n".join(["file,slice,box,lesion,split,window", *rows]) + "\n")
        faults: list[UmedError] = []
        return choose_slices(read_annotations(load_recipe(recipe), tmp_path).items, faults, Counter()), faults

    normal, *lesions = "b.nii,0,,,train,", f'b.nii,3,{BOX},cyst,train,"0, 900"', f'b.nii,5,{BOX},cyst,train,"0, 900"'
    (image,), faults = chosen(normal, *lesions)
    assert image.window == (0, 900) and not faults
    images, (fault,) = chosen(normal, lesions[0], f'b.nii,5,{BOX},cyst,train,"0, 90"')
    assert not images and "a.csv:4: window of slice 5" in str(fault) and "(0.0, 900.0) of slice 3 in" in str(fault)
    (image,), faults = chosen('b.nii,0,,,train,"0, 7"')
    assert image.window == (0, 7) and not faults
