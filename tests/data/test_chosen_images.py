"""Which annotated images a recipe takes: its splits and folders, what it leaves out, and negatives from a list."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.annotation_formats import CSV, by_name, coco, csv_xyxy, read, two_images
from support.drawn import write_recipe

from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.recipes.recipe import load_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_images(tmp_path)


def test_ignored_classes_leave_the_image_out(folder: Path) -> None:
    recipe = write_recipe(folder, coco(folder), extra="ignore_classes: [cy]\n")
    recipe.write_text(recipe.read_text().replace("  cy: {name: cyst}\n", ""))
    found = read_annotations(load_recipe(recipe))
    assert list(by_name(found)) == ["neg.png"]
    assert found.left_out == {"holds an ignored class": 1}


def test_negatives_can_be_dropped(folder: Path) -> None:
    found = read(folder, coco(folder), extra="negatives: drop\n")
    assert list(by_name(found)) == ["pos.png"]
    assert found.left_out == {"negative": 1}


def test_missing_images_are_set_aside(folder: Path) -> None:
    (folder / "neg.png").unlink()
    found = read(folder, coco(folder))
    assert [item.image.name for item in found.missing] == ["neg.png"]
    assert list(by_name(found)) == ["pos.png"]


def write_patients(folder: Path, names: list[str]) -> str:
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\n" + "".join(f"{name},,,,,\n" for name in names))
    for name in names:
        (folder / name).write_bytes(b"")
    return CSV % ""


def test_patients_are_dealt_out_whole_and_the_same_every_time(tmp_path: Path) -> None:
    names = [f"{patient:03}_{image}.png" for patient in range(500) for image in range(2)]
    rule = "{by: patient, seed: SEED, patient_pattern: '^(\\d+)_', fractions: {train: 0.7, val: 0.1, test: 0.2}}"

    def splits(order: list[str], seed: int) -> dict[str, str]:
        found = read(tmp_path, write_patients(tmp_path, order), rule.replace("SEED", str(seed)))
        return {item.image.name: item.split for item in found.items}

    first = splits(names, 0)
    counts = {split: list(first.values()).count(split) / len(names) for split in ("train", "val", "test")}
    # Three standard deviations of 500 patients.
    assert counts == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.06)
    assert all(len({first[f"{patient:03}_{image}.png"] for image in range(2)}) == 1 for patient in range(500))
    assert splits(names[::-1], 0) == first
    assert splits(names, 1) != first
    # Who has fewer of the images, as of an archive that is not downloaded yet, has them in the same splits.
    assert splits(names[300:340], 0) == {name: first[name] for name in names[300:340]}


def test_a_split_of_no_share_stays_empty(tmp_path: Path) -> None:
    names = [f"{patient:03}_0.png" for patient in range(300)]
    found = read(
        tmp_path, write_patients(tmp_path, names), "{by: patient, fractions: {train: 0.6, val: 0.0, test: 0.4}}"
    )
    assert {item.split for item in found.items} == {"train", "test"}


def test_copies_are_of_one_patient_and_one_of_them_is_held_out(tmp_path: Path) -> None:
    names = [f"{stem:02}_jpg.rf.{copy}.png" for stem in range(40) for copy in "abc"]
    found = read(tmp_path, write_patients(tmp_path, names), "{by: patient, copy_pattern: '^(.+)\\.rf\\.'}")
    by_split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for item in found.items:
        by_split[item.split].append(item.image.name)
        assert item.patient == item.copy_of == item.image.name[:6]
    assert all(name.endswith(".rf.a.png") for split in ("val", "test") for name in by_split[split])
    assert len({name[:2] for name in by_split["train"]}) * 3 == len(by_split["train"])
    held_out = len(by_split["val"]) + len(by_split["test"])
    assert held_out > 0
    assert found.left_out == {"augmented copy in val or test": 2 * held_out}


COPIES = "{by: column, copy_pattern: '^(.+)\\.rf\\.'}"
TEST_COLUMNS = "file: file, box: box, lesion: lesion, split: split"


def test_all_phrases_of_a_held_out_image_stay(tmp_path: Path) -> None:
    rows = [
        f'{name},"1, 2, 30, 40",nod,{text},test' for name in ("a.rf.1.png", "a.rf.2.png") for text in ("One", "Two")
    ]
    (tmp_path / "a.csv").write_text("\n".join(["file,box,lesion,text,split", *rows]))
    for name in ("a.rf.1.png", "a.rf.2.png"):
        (tmp_path / name).write_bytes(b"")
    found = read(tmp_path, f"{{reader: csv, files: a.csv, phrase: text, columns: {{{TEST_COLUMNS}}}}}", COPIES)
    assert [(item.image.name, item.phrase) for item in found.items] == [("a.rf.1.png", "One"), ("a.rf.1.png", "Two")]
    assert found.left_out == {"augmented copy in val or test": 2}


def test_all_slices_of_a_held_out_volume_stay(tmp_path: Path) -> None:
    rows = [f'{name},"1, 2, 30, 40",nod,{k},test' for name in ("a.rf.1.nii", "a.rf.2.nii") for k in (2, 5)]
    (tmp_path / "a.csv").write_text("\n".join(["file,box,lesion,slice,split", *rows]))
    for name in ("a.rf.1.nii", "a.rf.2.nii"):
        (tmp_path / name).write_bytes(b"")
    found = read(tmp_path, f"{{reader: csv, files: a.csv, columns: {{{TEST_COLUMNS}, slice: slice}}}}", COPIES)
    assert [(item.image.name, item.slice) for item in found.items] == [("a.rf.1.nii", 2), ("a.rf.1.nii", 5)]


def test_the_first_copy_that_is_on_disk_is_held_out(tmp_path: Path) -> None:
    names = ["a.rf.1.png", "a.rf.2.png", "a.rf.3.png"]
    (tmp_path / "a.csv").write_text("\n".join(["file,box,lesion,split", *(f"{name},,,test" for name in names)]))
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"")
    found = read(tmp_path, f"{{reader: csv, files: a.csv, columns: {{{TEST_COLUMNS}}}}}", COPIES)
    assert [item.image.name for item in found.items] == ["a.rf.2.png"] and not found.missing


def test_the_patient_is_the_file_name_without_ending_when_nothing_says_it(tmp_path: Path) -> None:
    found = read(tmp_path, write_patients(tmp_path, ["a.nii.gz", "b.rf.12.png"]))
    assert [item.patient for item in found.items] == ["a", "b.rf.12"]


def test_images_are_looked_for_in_several_folders(folder: Path) -> None:
    """NIH's images lie in twelve folders, DeepLesion's in one of a series' name or under their own."""
    for name in ("part_1/images", "part_2/images", "flat"):
        (folder / name).mkdir(parents=True)
    (folder / "pos.png").rename(folder / "part_2" / "images" / "pos.png")
    (folder / "neg.png").rename(folder / "flat" / "a_neg.png")
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\np_pos.png,1,2,3,4,nod\na_neg.png,,,,,\nc_d.png,,,,,\n")
    roots = "rename: ['^._', ''], image_root: ['part_*/images', flat]"
    found = read(folder, CSV % f", {roots}")
    assert [item.image for item in found.items] == [folder / "part_2/images/pos.png", folder / "flat/a_neg.png"]
    assert [item.image for item in found.missing] == [folder / "part_1/images/d.png"]


def test_image_folders_per_split(folder: Path) -> None:
    """Roboflow calls its folder `valid`."""
    for name in ("train", "valid"):
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "labels").mkdir()
    (folder / "pos.png").rename(folder / "train/images/pos.png")
    (folder / "neg.png").rename(folder / "valid/images/neg.png")
    (folder / "train/labels/pos.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    files = "files: {train: train/labels, val: valid/labels}, names: [cy, nod]"
    roots = "image_root: {train: '{split}/images', val: valid/images}"
    items = by_name(read(folder, f"{{reader: yolo, {files}, {roots}}}", "{by: file}"))
    assert {name: (item.split, item.classes) for name, item in items.items()} == {
        "pos.png": ("train", ["nodule"]),
        "neg.png": ("val", []),
    }


def test_a_pattern_stands_for_one_annotation_file(folder: Path) -> None:
    csv_xyxy(folder)
    assert set(by_name(read(folder, (CSV % "").replace("a.csv", "a*.csv")))) == {"pos.png", "neg.png"}
    (folder / "a2.csv").write_text("")
    (message,) = read(folder, (CSV % "").replace("a.csv", "'a*.csv'")).faults.messages
    assert "a*.csv: matches a.csv, a2.csv; needed: one" in message


def test_an_image_with_a_row_to_be_left_out_is_left_out_whole(folder: Path) -> None:
    (folder / "a.csv").write_text(
        "file,x1,y1,x2,y2,lesion,noisy\npos.png,1,2,3,4,nod,0\npos.png,5,6,7,8,nod,1\nneg.png,1,2,3,4,cy,0\n"
    )
    found = read(folder, CSV % ", leave_out_images: {noisy: ['1']}")
    assert list(by_name(found)) == ["neg.png"]
    assert found.left_out == {"noisy is 1": 1}
    (message,) = read(folder, CSV % ", leave_out_images: {nosy: ['1']}").faults.messages
    assert "has no column 'nosy' (annotations.leave_out_images). Did you mean 'noisy'?" in message


def write_listed(folder: Path) -> str:
    """4 images with a lesion, 3 with one by the list alone, 6 listed without, one of them not on disk and one annotated."""
    names = [f"{letter}.png" for letter in "abcdefghij"]
    for name in names:
        (folder / name).write_bytes(b"")
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion\n" + "".join(f"{name},1,2,3,4,nod\n" for name in names[:4]))
    listed = [(name, "none") for name in [*names[3:8], "z.png"]] + [(name, "cy") for name in names[8:]]
    (folder / "list_v2.csv").write_text("Image,Labels\n" + "".join(f"{name},{label}\n" for name, label in listed))
    return "negatives: {listed: {files: 'list*.csv', file: Image, only_rows: {Labels: [none]}}}\n"


def test_negatives_from_a_list(tmp_path: Path) -> None:
    found = read(tmp_path, CSV % "", extra=write_listed(tmp_path))
    assert {name: len(item.boxes) for name, item in by_name(found).items()} == {
        **{f"{letter}.png": 1 for letter in "abcd"},
        **{f"{letter}.png": 0 for letter in "efgh"},
    }
    assert found.missing == []
    assert found.left_out == {"listed as negative, but annotated": 1, "listed as negative, not on disk": 1}


def test_an_image_of_an_ignored_class_does_not_come_back_as_a_negative(tmp_path: Path) -> None:
    extra = write_listed(tmp_path) + "ignore_classes: [odd]\n"
    (tmp_path / "a.csv").write_text("file,x1,y1,x2,y2,lesion\ne.png,1,2,3,4,odd\n")
    assert list(by_name(read(tmp_path, CSV % "", extra=extra))) == ["d.png", "f.png", "g.png", "h.png"]


def test_which_and_how_many_negatives(tmp_path: Path) -> None:
    extra = write_listed(tmp_path)
    only = extra.replace("negatives: {", "negatives: {only: '^[ef]', ")
    found = read(tmp_path, CSV % "", extra=only)
    assert [item.image.name for item in found.items if not item.boxes] == ["e.png", "f.png"]
    assert found.left_out["listed as negative, but not one of negatives.only"] == 2
    rule = "{by: patient, seed: SEED, fractions: {train: 1.0, val: 0.0, test: 0.0}}"

    def chosen(seed: int) -> list[str]:
        half = extra.replace("negatives: {", "negatives: {per_positive: 0.5, ")
        found = read(tmp_path, CSV % "", rule.replace("SEED", str(seed)), extra=half)
        assert found.left_out["negative above negatives.per_positive"] == 2
        return [item.image.name for item in found.items if not item.boxes]

    picked = [chosen(seed) for seed in range(6)]
    assert {len(names) for names in picked} == {2}
    assert picked == [chosen(seed) for seed in range(6)]
    assert len({tuple(names) for names in picked}) > 1


def test_an_image_without_a_lesion_that_may_show_one_is_left_out(folder: Path) -> None:
    """TBX11K has a TB image without a box; only those of its healthy folder are known to be without."""
    found = read(folder, csv_xyxy(folder), extra="negatives: {only: ^health/}\n")
    assert list(by_name(found)) == ["pos.png"]
    assert found.left_out == {"without a lesion, but not one of negatives.only": 1}
