"""Mistakes of names and places: files that are named in another way, and images outside of the data root."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.annotation_files import (
    BOX,
    COCO,
    CSV,
    HEAD,
    JSON,
    MASK,
    VOC,
    YOLO,
    an_object,
    boxes,
    coco,
    put,
    read,
    two_regions,
    xml,
)
from support.drawn import write_recipe

from umed_plugin.data.build import build_records
from umed_plugin.data.preparation import missing_image
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import load_records, save_records


def test_a_voc_file_name_without_its_ending(tmp_path: Path) -> None:
    put(tmp_path / "img" / "a.png")
    text = '<?xml version="1.0" encoding="GB2312"?>' + xml("a", an_object())
    put(tmp_path / "xml" / "a.xml", text)
    assert boxes(read(tmp_path, VOC % "")) == {"img/a.png": [BOX]}
    assert boxes(read(tmp_path, (VOC % "").replace("xml/*", f"{tmp_path}/xml/*"))) == {"img/a.png": [BOX]}


def test_split_lists_in_the_forms_that_there_are(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "unlisted"):
        put(tmp_path / "img" / f"{name}.png")
        put(tmp_path / "xml" / f"{name}.xml", xml(f"{name}.png", an_object()))
    put(tmp_path / "train.txt", b"\xef\xbb\xbfa.png\nJPEGImages/b.jpg\nlost\n")
    put(tmp_path / "val.txt", "c -1\n")
    found = read(tmp_path, VOC % ", split_lists: {train: train.txt, val: val.txt}", "{by: file}")
    assert {item.image.name: item.split for item in found.items} == {"a.png": "train", "b.png": "train", "c.png": "val"}
    assert found.left_out == {"its XML is in none of split_lists": 1}
    assert found.faults.left_out == {("names in train.txt", "no XML has this name"): 1}


def test_a_split_list_means_one_of_several_xml_files_of_a_name(tmp_path: Path) -> None:
    for folder in "pq":
        put(tmp_path / folder / "1.png")
        put(tmp_path / "xml" / folder / "1.xml", xml(f"{folder}/1.png", an_object()))
    annotations = "{reader: voc, files: 'xml/**/*.xml', split_lists: {train: train.txt, val: val.txt}}"
    put(tmp_path / "train.txt", "images/p/1.png\n")
    put(tmp_path / "val.txt", "")
    found = read(tmp_path, annotations, "{by: file}")
    assert boxes(found) == {"p/1.png": [BOX]} and found.left_out == {"its XML is in none of split_lists": 1}
    put(tmp_path / "val.txt", "q/1\n")
    assert {item.image.parent.name: item.split for item in read(tmp_path, annotations, "{by: file}").items} == {
        "p": "train",
        "q": "val",
    }
    put(tmp_path / "val.txt", "1\n")
    (message,) = read(tmp_path, annotations, "{by: file}").faults.messages
    assert "'1' may be" in message and "p/1.xml or" in message and "q/1.xml, like 1 names" in message
    assert "before each name, such as p/1, or give each split the pattern" in message


def test_a_split_list_where_each_split_has_a_tree_of_the_same_names(tmp_path: Path) -> None:
    """With the folders of the images, of the XML files, or none: `files` says whose they are."""
    for split in ("train", "val"):
        put(tmp_path / split / "JPEGImages" / "1.png")
        put(tmp_path / split / "Annotations" / "1.xml", xml("1.png", an_object()))
    annotations = (
        "{reader: voc, files: {train: train/Annotations/*.xml, val: val/Annotations/*.xml}, image_root: {train: "
        "train/JPEGImages, val: val/JPEGImages}, split_lists: {train: train.txt, val: val.txt}}"
    )
    for written in ("%s/JPEGImages/1.png", "Annotations/1", "1"):
        for split in ("train", "val"):
            put(tmp_path / f"{split}.txt", written.replace("%s", split))
        found = read(tmp_path, annotations, "{by: file}")
        assert {item.image.parts[-3]: item.split for item in found.items} == {"train": "train", "val": "val"}


@pytest.mark.parametrize(
    "written", [r"sub\A.png", "sub/%41.png", "sub/a.PNG", "SUB/A.png", "sub/A.jpg", "sub/B_lesoin.png"]
)
def test_the_name_that_was_probably_meant(tmp_path: Path, written: str) -> None:
    from umed_plugin.data.annotations.finding import did_you_mean_file

    for name in ("A.png", "B_lesion.png"):
        put(tmp_path / "sub" / name)
    expected = "sub/B_lesion.png" if "les" in written else "sub/A.png"
    assert did_you_mean_file(tmp_path / written, tmp_path) == f" Did you mean {expected!r}?"
    assert did_you_mean_file(tmp_path / "sub" / "image_12.png", tmp_path) == ""


def test_a_name_whose_accent_is_encoded_in_another_way(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    put(tmp_path / apart, np.zeros((80, 100), np.uint8))
    put(tmp_path / "a.csv", f"{HEAD}{composed},10,20,30,40,nod\n")
    (item,) = read(tmp_path, CSV % "").missing
    error = str(missing_image(item))
    assert (
        f"Did you mean {apart!r}? Both look the same, but encode an accent in two ways (Unicode NFC and NFD)." in error
    )


def test_brackets_in_a_name_that_exists_are_no_pattern(tmp_path: Path) -> None:
    for folder in ("set [1]", "set 1"):
        put(tmp_path / folder / "a.png")
        put(tmp_path / folder / "xml" / "a.xml", xml("a.png", an_object()))
    annotations = "{reader: voc, files: 'set [%s]/xml/*.xml', image_root: 'set %s'}"
    assert boxes(read(tmp_path, annotations % ("1", "[1]"))) == {"set [1]/a.png": [BOX]}
    assert boxes(read(tmp_path, annotations % ("12", "1"))) == {"set 1/a.png": [BOX]}
    put(tmp_path / "scan [2].xml", xml("a.png", an_object()))
    assert boxes(read(tmp_path, "{reader: voc, files: 'scan [2].xml', image_root: set 1}")) == {"set 1/a.png": [BOX]}


def test_links_to_folders_are_followed_and_files_that_a_pattern_misses_are_told(tmp_path: Path) -> None:
    put(tmp_path / "real" / "a.xml", xml("a.png", an_object()))
    put(tmp_path / "img" / "a.png")
    (tmp_path / "xml").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    put(tmp_path / "real" / "B.XML", xml("b.png"))
    put(tmp_path / "real" / "s" / "c.xml", xml("c.png"))
    found = read(tmp_path, (VOC % "").replace("xml/*", "x*/a"))
    assert boxes(found) == {"img/a.png": [BOX]}
    remarks = read(tmp_path, VOC % "").faults.remarks
    assert any(
        "1 further files do not fit the pattern, since they differ from it in case alone" in line for line in remarks
    )
    assert any(
        "1 further files do not fit the pattern, since they are in sub folders. If no other pattern reads them, xml/**/*.xml"
        in line
        for line in remarks
    )


@pytest.mark.parametrize("pattern", ["xml/**/*.xml", "xml/a*.xml", "xml/?_1.xml", "**/*.xml", "*/a*.xml"])
def test_every_pattern_tells_the_files_that_it_misses(tmp_path: Path, pattern: str) -> None:
    for name in ("a_1.xml", "a_2.XML", "b_3.XML", "s/a_1.xml"):
        put(tmp_path / "xml" / name, xml("a.png"))
    remarks = " ".join(read(tmp_path, (VOC % "").replace("xml/*.xml", pattern)).faults.remarks)
    missed = {"xml/a*.xml": 1, "*/a*.xml": 1, "xml/?_1.xml": 0}.get(pattern, 2)
    assert ("differ from it in case alone" in remarks) == bool(missed)
    assert not missed or f"{missed} further files do not fit the pattern, since they differ" in remarks
    assert ("1 further files do not fit the pattern, since they are in sub folders" in remarks) == ("**" not in pattern)


@pytest.mark.parametrize("pattern", ["xml/*.xml", "xml/**/*.xml"])
def test_a_link_that_leads_nowhere_is_a_record_that_would_be_lost(tmp_path: Path, pattern: str) -> None:
    for name in "abc":
        put(tmp_path / "img" / f"{name}.png")
        put(tmp_path / "xml" / f"{name}.xml", xml(f"{name}.png", an_object()))
    (tmp_path / "xml" / "b.xml").unlink()
    (tmp_path / "xml" / "b.xml").symlink_to("../store/not-fetched")
    faults = read(tmp_path, (VOC % "").replace("xml/*.xml", pattern)).faults
    assert faults.messages == [
        f"{tmp_path}/xml/b.xml: is a link to ../store/not-fetched, which is not there. Fetch it: git annex get, or datalad get"
    ]
    assert not any("not read" in remark for remark in faults.remarks)
    (tmp_path / "xml" / "c.xml").unlink()
    (tmp_path / "xml" / "c.xml").symlink_to("nowhere")
    (message,) = read(tmp_path, (VOC % "").replace("xml/*.xml", pattern)).faults.messages
    assert message.endswith("or datalad get. 1 more are such links")


@pytest.mark.parametrize("name", ["a.json", "*.json"])
def test_an_annotation_file_that_is_a_link_that_leads_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").symlink_to("XX")
    (message,) = read(tmp_path, (COCO % "").replace("a.json", f"'{name}'")).faults.messages
    assert "a.json: no such annotation file. It is a link to XX, which is not there. Fetch it" in message
    put(tmp_path / "b.json", "{}")
    if name == "*.json":
        (message,) = read(tmp_path, (COCO % "").replace("a.json", f"'{name}'")).faults.messages
        assert "matches a.json, b.json; needed: one" in message


@pytest.mark.parametrize("name", ["a\0.png", "a" * 300 + ".png", "\ud800.png"])
@pytest.mark.parametrize("form", ["coco", "json"])
def test_names_that_no_file_can_have(tmp_path: Path, form: str, name: str) -> None:
    if form == "coco":
        coco(tmp_path, [(1, name)], [(1, [10, 20, 20, 20], {})])
    else:
        put(tmp_path / "a.json", json.dumps({name: {"b": []}}))
    (message,) = read(tmp_path, (COCO if form == "coco" else JSON) % "").faults.messages
    assert "cannot be the path of a file" in message


def test_lists_of_images_that_are_never_sent_have_no_mark(tmp_path: Path) -> None:
    from umed_plugin.data.writing.burnt_in import read_list

    put(tmp_path / "never.txt", b"\xef\xbb\xbfdrawn/a.png\ndrawn/b.png\n")
    assert read_list(tmp_path / "never.txt") == {"drawn/a.png", "drawn/b.png"}


def test_lists_of_images_that_are_never_sent_hold_names_with_odd_separators(tmp_path: Path) -> None:
    from umed_plugin.data.writing.burnt_in import read_list, write_list

    names = {"drawn/a\u2028b.png", "drawn/c\x85d.png", "drawn/e\x0cf.png"}
    write_list(dict.fromkeys(names, "text in its left corner"), tmp_path / "never.txt", set())
    assert read_list(tmp_path / "never.txt") == names
    put(tmp_path / "windows.txt", b"drawn/a.png\r\n\r\ndrawn/b.png\t# why\r\n")
    assert read_list(tmp_path / "windows.txt") == {"drawn/a.png", "drawn/b.png"}


@pytest.mark.parametrize("form", ["csv", "coco", "json"])
def test_folders_of_classes_in_place_of_a_file_name_the_reader_for_them(tmp_path: Path, form: str) -> None:
    put(tmp_path / "classes" / "nod" / "a.png")
    annotations = (
        ({"csv": CSV, "coco": COCO, "json": JSON}[form] % "").replace("a.csv", "classes").replace("a.json", "classes")
    )
    (message,) = read(tmp_path, annotations).faults.messages
    assert (
        "classes: is a folder; needed: the annotation file. Folders named by a class say what images show and not where: "
        "the reader folders reads them" in message
    )
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", "f,x1,y1,x2,y2,c\na.png,,,,,normal\n")
    (message,) = read(tmp_path, CSV % "").faults.messages
    assert "A value that means no lesion belongs in annotations.no_finding" in message
    assert boxes(read(tmp_path, CSV % ", no_finding: [normal]"))["a.png"] == []


# Images outside of the data root


def outside_by_dots(folder: Path, secret: Path) -> str:
    return "../secret/x.png"


def outside_by_an_absolute_path(folder: Path, secret: Path) -> str:
    return str(secret / "x.png")


def outside_by_a_link(folder: Path, secret: Path) -> str:
    (folder / "l.png").symlink_to(secret / "x.png")
    return "l.png"


def outside_by_a_linked_folder(folder: Path, secret: Path) -> str:
    (folder / "d").symlink_to(secret)
    return "d/x.png"


def outside_in_a_series(folder: Path, secret: Path) -> str:
    put(folder / "ser" / "1.dcm")
    (folder / "ser" / "2.dcm").symlink_to(secret / "x.png")
    return "ser"


OUTSIDE = [
    outside_by_dots,
    outside_by_an_absolute_path,
    outside_by_a_link,
    outside_by_a_linked_folder,
    outside_in_a_series,
]


@pytest.mark.parametrize("form", ["csv", "coco", "json", "listed"])
@pytest.mark.parametrize("place", OUTSIDE)
def test_images_outside_of_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: Callable[[Path, Path], str]
) -> None:
    folder, secret = tmp_path / "data", tmp_path / "secret"
    put(secret / "x.png")
    put(folder / "a.png")
    name, extra = place(folder, secret), ""
    if form == "coco":
        coco(folder, [(1, name)], [(1, [10, 20, 20, 20], {})])
    elif form == "json":
        put(folder / "a.json", json.dumps({name: {"b": [{"at": BOX}]}}))
    else:
        row = f"{name},10,20,30,40,nod\n"
        put(folder / "a.csv", HEAD + (row if form == "csv" else "a.png,10,20,30,40,nod\n"))
        put(folder / "none.csv", f"f\n{name}\n")
        extra = "negatives: {listed: {files: none.csv, file: f}}\n" if form == "listed" else ""
    annotations = {"csv": CSV, "listed": CSV, "coco": COCO, "json": JSON}[form] % ""
    (message,) = read(folder, annotations, extra=extra).faults.messages
    assert "is not in the data root" in message
    assert "name its folder in linked_roots of the recipe" in message
    assert read(folder, annotations, extra=f"{extra}linked_roots: ['{secret}']\n").faults.messages == []
    monkeypatch.setenv("UMED_LINKED_ROOTS", f"/nowhere{os.pathsep}{secret}")
    assert read(folder, annotations, extra=extra).faults.messages == []


def test_what_the_recipe_itself_names_may_be_anywhere(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png")
    put(tmp_path / "real" / "a.csv", HEAD + "x.png,10,20,30,40,nod\n")
    (tmp_path / "data").symlink_to(tmp_path / "real")
    for root in ("../elsewhere", str(tmp_path / "elsewhere"), "../else*"):
        assert len(boxes(read(tmp_path / "data", CSV % f", image_root: '{root}'"))) == 1


@pytest.mark.parametrize("reader", ["yolo", "mask"])
def test_links_among_the_images_of_a_folder(tmp_path: Path, reader: str) -> None:
    put(tmp_path / "secret" / "x.png")
    folder = tmp_path / "data"
    for name in ("images", "labels", "i"):
        (folder / name).mkdir(parents=True)
    put(folder / "m" / "x.png", two_regions(255, 255))
    (folder / ("images" if reader == "yolo" else "i") / "x.png").symlink_to(tmp_path / "secret" / "x.png")
    (message,) = read(folder, (YOLO if reader == "yolo" else MASK) % "").faults.messages
    assert "leads to" in message
    assert "is not in the data root" in message


def test_an_image_whose_name_is_not_utf_8_is_built(tmp_path: Path) -> None:
    """Linux allows such names; seeds and digests are made of them."""
    for number, stem in enumerate((b"a", b"b-\xff", b"c")):
        name = os.fsdecode(stem)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), (number, 0, 0)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    split = "{by: patient, fractions: {train: 0.5, val: 0.25, test: 0.25}}"
    annotations = "{reader: yolo, files: labels, image_root: images, names: [nod]}"
    recipe = load_recipe(write_recipe(tmp_path, annotations, split))
    records = build_records(recipe, out_dir=tmp_path / "out", data_root=tmp_path)
    assert [os.fsencode(Path(record["image"]).name) for record in records] == [b"a.png", b"b-\xff.png", b"c.png"]
    save_records(records, tmp_path / "out" / "records.json")
    assert load_records(tmp_path / "out" / "records.json") == records


def test_images_that_no_entry_names_are_counted(tmp_path: Path) -> None:
    """Most tables of boxes have no row for a normal image."""
    for name in ("a.png", "b.png", "normal1.PNG", "normal2.png", "notes.txt", ".hidden.png", "a_mask.png"):
        put(tmp_path / "img" / name)
    for name in "ab":
        put(tmp_path / "xml" / f"{name}.xml", xml(f"{name}.png", an_object()))
    told = " ".join(read(tmp_path, VOC % "").told())
    assert f"{tmp_path}/img: 2 of 5 image files are named by no entry that is read. The first: normal1.PNG" in told
    put(tmp_path / "xml" / "normal1.xml", xml("normal1.PNG"))
    put(tmp_path / "xml" / "normal2.xml", xml("normal2.png"))
    assert "named by no entry" not in " ".join(read(tmp_path, VOC % "").told())
