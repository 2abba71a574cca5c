"""From annotations to records: what LLaVA will read, and that boxes sit where the lesions are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.drawn import (
    BOX,
    HEIGHT,
    WIDTH,
    bright_box,
    scene,
    write_dicom,
    write_nifti,
    write_png,
    write_png16,
    write_recipe,
)

from umed_plugin import cli
from umed_plugin.data.build import build_records
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.records import load_records, record_geometry, save_records, true_boxes
from umed_plugin.errors import UmedError, UsageError
from umed_plugin.grounding.boxes import parse_boxes, set_iou

COLUMNS = "{file: file, box: [x1, y1, x2, y2], lesion: lesion, slice: slice}"
CSV = f"{{reader: csv, files: a.csv, columns: {COLUMNS}}}"


def write_rows(folder: Path, *rows: str) -> None:
    (folder / "a.csv").write_text("file,x1,y1,x2,y2,lesion,slice\n" + "".join(f"{row}\n" for row in rows))


def build(folder: Path, *rows: str, extra: str = "", **options: Any) -> list[dict[str, Any]]:
    write_rows(folder, *rows)
    recipe = load_recipe(write_recipe(folder, CSV, extra=extra))
    return build_records(recipe, out_dir=folder / "out", **options)


def pixels_of(record: dict[str, Any], folder: Path) -> np.ndarray:
    """What plain LLaVA reads: ``os.path.join(image_folder, image)`` gives absolute paths back unchanged."""
    with Image.open(folder / "out" / record["image"]) as image:
        return np.asarray(image.convert("RGB"))


def row(name: str, box: tuple[float, ...] = BOX, lesion: str = "nod", slice: Any = "") -> str:
    return ",".join(map(str, (name, *box, lesion, slice)))


DISPLAYED = "image: {box_frame: displayed}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_png(tmp_path / "a.png", scene())
    return tmp_path


@pytest.mark.llava
def test_every_kind_of_file_ends_with_its_box_on_the_lesion(folder: Path) -> None:
    write_png16(folder / "b.png", scene())
    (folder / "sub").mkdir()
    write_dicom(folder / "sub" / "c.dcm", scene()[:, ::-1], orientation=(-1, 0, 0, 0, 1, 0))
    volume = np.full((WIDTH, HEIGHT, 3), 0.1)
    volume[:, :, 1] = scene()[::-1, ::-1].T
    write_nifti(folder / "d.nii.gz", volume, np.eye(4))
    records = build(folder, row("a.png"), row("b.png"), row("sub/c.dcm"), row("d.nii.gz", slice=1), extra=DISPLAYED)
    assert [record["image"] for record in records] == [
        str(folder / "a.png"),
        "images/drawn/b.png.png",
        "images/drawn/sub/c.dcm.png",
        "images/drawn/d.nii.gz_slice1.png",
    ]
    assert [record["id"] for record in records] == ["drawn/a.png", "drawn/b.png", "drawn/sub/c.dcm", "drawn/d.nii.gz#1"]
    for record in records:
        assert record["image_size"] == [WIDTH, HEIGHT]
        assert true_boxes(record) == [BOX]
        assert bright_box(pixels_of(record, folder)) == BOX, record["id"]
    assert b"secret-7" not in (folder / "out" / records[2]["image"]).read_bytes()
    assert not list((folder / "out").rglob("*.partial"))


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_the_box_in_the_text_is_bright_in_what_the_model_sees(folder: Path, mode: str) -> None:
    """All the way: DICOM with mirrored columns, rendered, LLaVA's expand2square, CLIPImageProcessor, the answer's box."""
    from types import SimpleNamespace

    from llava.mm_utils import process_images
    from transformers import CLIPImageProcessor

    box = (40, 12, 66, 40)
    write_dicom(folder / "c.dcm", scene(box)[:, ::-1], orientation=(-1, 0, 0, 0, 1, 0))
    (record,) = build(folder, row("c.dcm", box), extra=DISPLAYED, image_aspect_ratio=mode, box_decimals=3)
    (told,) = parse_boxes(record["conversations"][1]["value"])
    image = Image.fromarray(pixels_of(record, folder))
    processor = CLIPImageProcessor(do_normalize=False)
    config = SimpleNamespace(image_aspect_ratio="pad" if mode == "pad" else None)
    seen = process_images([image], processor, config)[0][0].numpy()
    found = np.array(bright_box(np.uint8(np.clip(seen, 0, 1) * 255))) / seen.shape[0]
    np.testing.assert_allclose(told, found, atol=1.5 / seen.shape[0] + 0.0005)


@pytest.mark.llava
@pytest.mark.parametrize(("axes", "box"), [("xy", BOX), ("yx", (BOX[1], BOX[0], BOX[3], BOX[2]))])
def test_boxes_given_in_the_stored_frame_move_along(folder: Path, axes: str, box: tuple[int, ...]) -> None:
    """RAS voxel indices: x to the patient's right, y to the front; shown with both turned round."""
    write_nifti(folder / "d.nii.gz", scene().T[:, :, None], np.eye(4))
    extra = f"image: {{box_frame: stored, box_axes: {axes}}}\n"
    (record,) = build(folder, row("d.nii.gz", box), extra=extra)
    expected = (WIDTH - BOX[2], HEIGHT - BOX[3], WIDTH - BOX[0], HEIGHT - BOX[1])
    assert true_boxes(record) == [expected]
    assert bright_box(pixels_of(record, folder)) == expected


@pytest.mark.llava
def test_transposed_slices_change_the_size(folder: Path) -> None:
    write_dicom(folder / "c.dcm", np.ascontiguousarray(scene().T), orientation=(0, 1, 0, 1, 0, 0))
    (record,) = build(folder, row("c.dcm", (BOX[1], BOX[0], BOX[3], BOX[2])), extra="image: {box_frame: stored}\n")
    assert record["image_size"] == [WIDTH, HEIGHT]
    assert true_boxes(record) == [BOX] == [bright_box(pixels_of(record, folder))]


@pytest.mark.llava
def test_what_a_record_holds(folder: Path) -> None:
    write_png(folder / "n.png", scene() * 0.3)
    lower, upper = (60, 40, 70, 50), BOX
    records = build(folder, row("a.png", lower, "cy"), row("a.png", upper), ",".join(["n.png", *[""] * 6]), seed=4)
    positive, negative = records
    assert positive["objects"] == {"ref": ["nodule", "cyst"], "bbox": [list(upper), list(lower)], "bbox_type": "real"}
    assert positive["terms"] == {"nodule": ["nodule", "nodular opacity"], "cyst": ["cyst"]}
    assert (positive["source"], positive["modality"], positive["patient"]) == ("drawn", "CT", "a")
    assert (positive["answer_type"], negative["answer_type"]) == ("grounded", "negative")
    provenance = positive["provenance"]
    assert provenance["original"] == "a.png"
    assert (provenance["image_aspect_ratio"], provenance["box_decimals"], provenance["seed"]) == ("pad", 2, 4)
    assert len(provenance["recipe_sha256"]) == 64
    assert negative["objects"] == {"ref": [], "bbox": [], "bbox_type": "real"}
    assert positive["conversations"][0]["value"].startswith("<image>\n")
    told = parse_boxes(positive["conversations"][1]["value"])
    geometry = record_geometry(positive)
    assert set_iou(geometry.from_square(told), true_boxes(positive)) > 0.85
    assert parse_boxes(negative["conversations"][1]["value"]) == []


@pytest.mark.llava
def test_records_go_through_a_file_and_are_the_same_every_time(folder: Path) -> None:
    rows = [row("a.png"), row("a.png", (60, 40, 70, 50), "cy")]
    first, second = build(folder, *rows), build(folder, *rows)
    assert first == second
    save_records(first, folder / "new" / "r.json")
    assert load_records(folder / "new" / "r.json") == first
    assert list((folder / "new").iterdir()) == [folder / "new" / "r.json"]
    others = [build(folder, *rows, seed=seed)[0]["conversations"] for seed in range(1, 6)]
    assert any(other != first[0]["conversations"] for other in others)


@pytest.mark.llava
def test_wording_does_not_depend_on_the_other_images(folder: Path) -> None:
    """Adding an image must not change the text of the rest."""
    for i in range(12):
        write_png(folder / f"{i}.png", scene())
    alone = {
        record["id"]: record["conversations"] for record in build(folder, *[row(f"{i}.png") for i in range(6, 12)])
    }
    together = {
        record["id"]: record["conversations"] for record in build(folder, *[row(f"{i}.png") for i in range(12)])
    }
    assert {key: together[key] for key in alone} == alone
    assert len({str(text) for text in together.values()}) > 4


@pytest.mark.llava
def test_all_faults_at_once(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    rows = [
        row("a.png", (80, 10, 99.5, 20)),
        row("a.png", (30, 10, 20, 20)),
        row("broken.png"),
        row("gone.png"),
        row("a.png", lesion="nodd"),
    ]
    with pytest.raises(UmedError) as caught:
        build(folder, *rows[:4])
    text = str(caught.value)
    assert "4 faults" in text
    assert "a.csv:2: box [80.0, 10.0, 99.5, 20.0] leaves a.png (97x61) by 2.5 px. Allowed: 1 (box_tolerance)" in text
    assert "box [30.0, 10.0, 20.0, 20.0] of a.png has no area. Is annotations.convention right?" in text
    assert "broken.png: cannot be read as an image" in text
    assert "gone.png: no such image, but" in text
    assert "https://example.org/drawn" in text
    with pytest.raises(UmedError, match=r"class 'nodd' \(1 boxes\) is not in the recipe. Did you mean 'nod'"):
        build(folder, rows[4])


@pytest.mark.llava
def test_a_missing_image_and_the_name_that_was_meant(folder: Path) -> None:
    with pytest.raises(
        UmedError, match=r"A\.PNG: no such image, but .* names it\. Did you mean 'a\.png'\? Get it from"
    ):
        build(folder, row("A.PNG"))


@pytest.mark.llava
def test_bad_images_can_be_skipped_and_bad_boxes_cannot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    records = build(folder, row("a.png"), row("broken.png"), row("gone.png"), on_bad_image="skip")
    assert [record["id"] for record in records] == ["drawn/a.png"]
    warning = capsys.readouterr().err
    assert "umed: warning: drawn: 2 images skipped" in warning
    assert "broken.png" in warning
    with pytest.raises(UmedError, match="has no area"):
        build(folder, row("a.png", (5, 5, 5, 9)), on_bad_image="skip")


@pytest.mark.llava
def test_a_pixel_outside_is_cut_and_more_is_a_fault(folder: Path) -> None:
    (record,) = build(folder, row("a.png", (-0.8, 3, 97.9, 61)))
    assert true_boxes(record) == [(0, 3, 97, 61)]
    (record,) = build(folder, row("a.png", (-4, 3, 20, 61)), extra="box_tolerance: 5\n")
    assert true_boxes(record) == [(0, 3, 20, 61)]
    with pytest.raises(UmedError, match=r"by 0\.8 px. Allowed: 0"):
        build(folder, row("a.png", (-0.8, 3, 20, 61)), extra="box_tolerance: 0\n")


@pytest.mark.llava
def test_slivers_can_be_dropped_but_never_make_a_negative(folder: Path) -> None:
    write_png(folder / "b.png", scene())
    rows = [row("a.png", (5, 5, 5, 9)), row("a.png"), row("b.png", (5, 5, 5, 9))]
    (record,) = build(folder, *rows, extra="degenerate_boxes: drop\n")
    assert record["id"] == "drawn/a.png"
    assert true_boxes(record) == [BOX]


@pytest.mark.llava
def test_annotations_of_another_version_of_the_image(folder: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 970, "height": 610}],
        "annotations": [],
        "categories": [{"id": 1, "name": "nod"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    recipe = load_recipe(write_recipe(folder, "{reader: coco, files: a.json}"))
    with pytest.raises(UmedError, match=r"a\.png is 970x610, but the file is 97x61"):
        build_records(recipe, out_dir=folder / "out")


@pytest.mark.llava
def test_square_mode_loses_and_cuts_lesions_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """97 x 61: the centre crop keeps x from 18 to 79."""
    write_png(folder / "lost.png", scene((0, 5, 12, 20)))
    rows = [row("a.png", (30, 20, 50, 40)), row("a.png", (70, 10, 95, 50)), row("lost.png", (0, 5, 12, 20))]
    (record,) = build(folder, *rows, image_aspect_ratio="square")
    warning = capsys.readouterr().err
    assert "removes 1 lesions" in warning
    assert "trims 1; 1 images are left out" in warning
    cut, whole = true_boxes(record)
    assert whole == (30, 20, 50, 40)
    assert cut == pytest.approx((70, 10, 79, 50), abs=0.3)
    told = parse_boxes(record["conversations"][1]["value"])
    assert told[0][2] == 1.0
    assert set_iou(record_geometry(record).from_square(told), true_boxes(record)) > 0.9
    assert len(build(folder, *rows)) == 2
    # A class without a box, and two splits that two patients cannot fill.
    remarks = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[3] for line in remarks] == ["classes", "split", "split"]


@pytest.mark.llava
def test_one_split(folder: Path) -> None:
    for i in range(30):
        write_png(folder / f"{i}.png", scene())
    rows = [row(f"{i}.png") for i in range(30)]
    split_of = {record["image"]: record["split"] for record in build(folder, *rows)}
    for split in ("train", "val", "test"):
        wanted = [image for image, its in split_of.items() if its == split]
        assert wanted
        assert [record["image"] for record in build(folder, *rows, split=split)] == wanted
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        build(folder, *rows, split="trian")
    with pytest.raises(UmedError, match="no images in split 'val'"):
        build(folder, row("a.png"), split="val")


@pytest.mark.llava
def test_three_windows_become_the_channels(folder: Path) -> None:
    from support.drawn import write_png16

    write_png16(folder / "deep.png", scene())
    (folder / "a.csv").write_text('file,box,lesion\ndeep.png,"11, 7, 42, 19",nod\n')
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion}}"
    windows = "[lung, soft_tissue, {low: -1000, high: 1000}]"
    recipe = load_recipe(write_recipe(folder, annotations, extra=f"image: {{window: {windows}, offset: 32768}}\n"))
    (record,) = build_records(recipe, out_dir=folder / "out")
    with Image.open(folder / "out" / record["image"]) as image:
        assert image.mode == "RGB"
        # -800 HU: lung shows -1350 to 150, soft tissue black, the range a tenth.
        assert np.asarray(image)[0, 0].tolist() == [round(550 / 1500 * 255), 0, round(0.1 * 255)]


@pytest.mark.llava
def test_windows_by_column(folder: Path) -> None:
    write_png16(folder / "b.png", scene())
    (folder / "a.csv").write_text(f'file,box,lesion,win\nb.png,"{BOX}",nod,"-1000, 0"\n')
    annotations = "{reader: csv, files: a.csv, columns: {file: file, box: box, lesion: lesion, window: win}}"
    recipe = load_recipe(write_recipe(folder, annotations, extra="image: {window: column, offset: 32768}\n"))
    (record,) = build_records(recipe, out_dir=folder / "out")
    assert pixels_of(record, folder)[0, 0, 0] == 51
    (folder / "a.csv").write_text(f'file,box,lesion,win\nb.png,"{BOX}",nod,\n')
    with pytest.raises(UmedError, match=r"a\.csv:2: the window column is empty"):
        build_records(recipe, out_dir=folder / "out")


@pytest.mark.llava
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_a_box_of_no_numbers_is_a_fault_and_not_cut_to_the_image(folder: Path, value: str) -> None:
    for extra in ("", "degenerate_boxes: drop\n"):
        with pytest.raises(UmedError, match="is not of numbers"):
            build(folder, row("a.png", (1, 2, value, 20)), extra=extra)  # type: ignore[arg-type]


@pytest.mark.llava
@pytest.mark.parametrize(
    "content", ['{"images": []}', "[1]", "text", '[{"id": 1, "image": "a.png", "conversations": []}]']
)
def test_a_file_that_holds_no_built_records_is_never_replaced(
    folder: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the annotations themselves, or items that somebody wrote by hand."""
    write_rows(folder, row("a.png"))
    recipe = write_recipe(folder, CSV)
    out = folder / "annotations.json"
    out.write_text(content)
    assert cli.main(["recipe", "build", str(recipe), "--out", str(out)]) == 2
    assert "exists and does not hold records" in capsys.readouterr().err
    assert out.read_text() == content


@pytest.mark.llava
def test_records_of_another_recipe_are_replaced_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder, row("a.png"))
    recipe, out = write_recipe(folder, CSV), folder / "out.json"
    for number, other in enumerate(("", "[]", None, '[{"id": "x", "provenance": {"recipe": "liver"}}]')):
        if other is not None:
            out.write_text(other)
        assert cli.main(["recipe", "build", str(recipe), "--out", str(out)]) == 0
        assert ("holds records of liver, which will be replaced" in capsys.readouterr().err) == (number == 3)


@pytest.mark.llava
def test_another_build_in_the_folder_leaves_the_pictures_of_the_first_alone(folder: Path) -> None:
    """Another window, or another data root with the same names: the first records must go on showing what they showed."""
    write_png16(folder / "b.png", scene())
    (first,) = build(folder, row("b.png"), extra="image: {window: full}\n")
    before = pixels_of(first, folder)
    (again,) = build(folder, row("b.png"), extra="image: {window: full}\n")
    assert again["image"] == first["image"] == "images/drawn/b.png.png"
    (other,) = build(folder, row("b.png"), extra="image: {window: lung, offset: 32768}\n")
    assert other["image"] != first["image"]
    assert not np.array_equal(pixels_of(other, folder), before)
    assert np.array_equal(pixels_of(first, folder), before)
    (same,) = build(folder, row("b.png"), extra="image: {window: lung, offset: 32768}\n")
    assert same["image"] == other["image"]
    (folder / "out" / first["image"]).write_bytes(b"torn")
    (mended,) = build(folder, row("b.png"), extra="image: {window: full}\n")
    assert mended["image"] == first["image"]
    assert np.array_equal(pixels_of(mended, folder), before)


@pytest.mark.llava
def test_the_demo_recipe_reads_all_three_kinds(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", scene())
    write_dicom(tmp_path / "c.dcm", scene(), WindowCenter=0, WindowWidth=1000)
    write_nifti(tmp_path / "d.nii.gz", np.repeat(scene()[::-1, ::-1].T[:, :, None], 4, axis=2), np.eye(4))
    boxes = ",".join(map(str, BOX))
    (tmp_path / "annotations.csv").write_text(
        "file,x1,y1,x2,y2,lesion,patient,split,modality,slice\n"
        f"x.png,{boxes},nodule,p1,train,X-ray,\nc.dcm,{boxes},cyst,p2,val,CT,\nd.nii.gz,{boxes},effusion,p3,test,MR,2\n"
        "d.nii.gz,,,,,,p3,test,MR,0\n"
    )
    records = build_records(load_recipe("demo_studies"), out_dir=tmp_path / "out", data_root=tmp_path)
    assert [record["answer_type"] for record in records] == ["grounded"] * 3 + ["negative"]
    assert [record["split"] for record in records] == ["train", "val", "test", "test"]
    for record in records[:3]:
        assert bright_box(pixels_of(record, tmp_path)) == BOX


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("{}", "holds a dict. Expected: a list"),
        ("[1]", r"\[0\]: is int"),
        ('[{"id": 3}]', r"\[0\]: has no field 'image'"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UmedError, match=rf"r\.json.*{words}"):
        load_records(tmp_path / "r.json")


@pytest.mark.llava
def test_faults_of_records_are_named_by_index_and_field(folder: Path) -> None:
    (record,) = build(folder, row("a.png"))
    broken = [
        record,
        {**record, "objects": {"ref": ["nodule"], "bbox": [], "bbox_type": "real"}},
        {**record, "objects": {"ref": ["wart"], "bbox": [[1, 2, 3]], "bbox_type": "real"}},
        {**record, "image": 7},
    ]
    (folder / "r.json").write_text(json.dumps(broken))
    with pytest.raises(UmedError) as caught:
        load_records(folder / "r.json")
    text = str(caught.value)
    for words in ("[1]: 'objects' needs lists", "[2]: objects.ref 'wart'", "[2]: objects.bbox[0] is [1, 2, 3]"):
        assert words in text
    assert "[3]: field 'image' is int" in text
    assert "[0]" not in text.replace("bbox[0]", "")
    with pytest.raises(UmedError, match=r"no such file\. Write it with: umed recipe build"):
        load_records(folder / "nothing.json")


@pytest.mark.llava
def test_the_command_writes_what_llava_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder, row("a.png"))
    recipe = write_recipe(folder, CSV)
    out = folder / "built" / "all.json"
    assert cli.main(["recipe", "build", str(recipe), "--out", str(out), "--box-decimals", "3"]) == 0
    assert "1 records, 1 with lesions, 0 without" in capsys.readouterr().out
    (record,) = json.loads(out.read_text())
    assert len(record["conversations"][1]["value"].split("[")[1].split(",")[0]) == 5
    (folder / "a.png").unlink()
    assert cli.main(["recipe", "build", str(recipe), "--out", str(out)]) == 1
    assert "a.png: no such image" in capsys.readouterr().err


@pytest.mark.llava
def test_training_text_is_varied_in_a_build(folder: Path) -> None:
    rng = random.Random(0)
    for i in range(40):
        write_png(folder / f"{i}.png", scene())
    records = build(folder, *[row(f"{i}.png", (5, 5, rng.randint(20, 90), 50)) for i in range(40)])
    assert len({record["conversations"][0]["value"] for record in records}) >= 6
