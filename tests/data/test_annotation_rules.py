"""Rules of a recipe about its annotations: without effect they are told, and wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.annotation_files import ALL_IN_TRAIN, BOX, CSV, HEAD, JSON, MASK, boxes, put, read

from umed_plugin.errors import UmedError


@pytest.mark.parametrize(
    ("more", "split", "extra", "words"),
    [
        (", rename: ['^x_', '']", ALL_IN_TRAIN, "", "annotations.rename matches 0 of 2 names; not 'a.png'"),
        (
            ", only_rows: {c: [nod, nodd, '']}",
            ALL_IN_TRAIN,
            "",
            "only_rows.c: nothing in the data is 'nodd', so that has no",
        ),
        (", leave_out_images: {c: ['no']}", ALL_IN_TRAIN, "", "leave_out_images.c: nothing in the data is 'no'"),
        ("", ALL_IN_TRAIN, "ignore_classes: [odd]", "ignore_classes: no annotation names 'odd' (1 of 1)"),
        ("", ALL_IN_TRAIN, "", "classes: no annotation names 'cy' (1 of 2)"),
        (
            "",
            "{by: patient, copy_pattern: '^(.+)_copy', fractions: {train: 1}}",
            "",
            "copy_pattern: matches 0 of 2 names",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {slice_axis: 1}",
            "image.slice_axis: has no effect, since it concerns NIfTI volumes",
        ),
        (
            "",
            ALL_IN_TRAIN,
            "image: {orientation: as_stored}",
            "image.orientation: has no effect, since it concerns DICOM and NIfTI",
        ),
        (", image_root: nowhere", ALL_IN_TRAIN, "", "annotations.image_root: there is no folder"),
        (
            "",
            ALL_IN_TRAIN,
            "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [x]}}}",
            "lists no image without a",
        ),
    ],
)
def test_rules_without_effect_are_told(tmp_path: Path, more: str, split: str, extra: str, words: str) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\nb.png,,,,,\n")
    found = read(tmp_path, CSV % more, split, extra + "\n")
    assert found.faults.messages == []
    assert any(words in line for line in found.faults.remarks), found.faults.remarks


def test_rename_holds_for_listed_negatives_and_a_row_with_a_finding_counts(tmp_path: Path) -> None:
    for name in ("p1", "p2", "p3"):
        put(tmp_path / f"{name}.x.dicom")
    put(tmp_path / "a.csv", HEAD + "p1,10,20,30,40,nod\np2,,,,,No finding\np3,,,,,No finding\np3,,,,,odd\n")
    listed = "negatives: {listed: {files: a.csv, file: f, only_rows: {c: [No finding]}}}\n"
    found = read(tmp_path, CSV % r", rename: ['^(\w+)$', '\1.x.dicom'], only_rows: {c: [nod]}", extra=listed)
    assert boxes(found) == {"p1.x.dicom": [BOX], "p2.x.dicom": []}
    assert found.left_out == {"listed as negative, but not in all of its rows": 1}
    assert found.faults.left_out == {("rows of the CSV", "annotations.only_rows"): 3}


@pytest.mark.parametrize(
    ("annotations", "split", "extra", "words"),
    [
        (CSV % ", image_root: {train: a}", ALL_IN_TRAIN, "", "annotations.image_root: is given per split"),
        (CSV % ", image_root: '{stem}'", ALL_IN_TRAIN, "", "unknown name in braces 'stem'. Allowed: split"),
        (CSV % ", rename: [a, '\\2']", ALL_IN_TRAIN, "", "annotations.rename: the replacement"),
        (
            CSV % ", split_values: {1: train, '1': test}",
            ALL_IN_TRAIN,
            "",
            "annotations.split_values: the key '1' is there as number and as text",
        ),
        ((MASK % "").replace("{stem}", "{name}"), ALL_IN_TRAIN, "", "unknown name in braces 'name'"),
        (
            MASK % "",
            ALL_IN_TRAIN,
            "image: {box_axes: yx}\n",
            "image.box_axes: must be left out: the reader mask computes",
        ),
        (JSON.replace("{key}", "{key") % "", ALL_IN_TRAIN, "", "annotations.image: expected '}'"),
        (
            (CSV % "").replace("c}", "c, split: s}"),
            "{by: column}",
            "negatives: {listed: {files: a, file: f}}",
            "negatives.listed.split: missing",
        ),
    ],
)
def test_mistakes_of_a_recipe(tmp_path: Path, annotations: str, split: str, extra: str, words: str) -> None:
    with pytest.raises(UmedError) as caught:
        read(tmp_path, annotations, split, extra)
    assert words in str(caught.value)


NUMBERED = "{reader: csv, files: a.csv, columns: {file: 0, box: [1, 2, 3, 4], lesion: 5}%s}"
ROWS = "a.png,10,10,30,30,nod\na.png,50,50,70,70,nod\nb.png,20,20,40,40,nod\n"


def test_a_csv_without_titles_loses_no_row(tmp_path: Path) -> None:
    """keras-retinanet's CSV has none. Its first row would be read as titles, and its lesion would not be there."""
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", ROWS)
    faults = read(tmp_path, NUMBERED % "").faults.messages
    assert len(faults) == 5  # the file, and the four numbers of the box
    assert "its first line has 'a.png' in column 0 (annotations.columns.file)" in faults[0]
    assert "annotations.header: false" in faults[0]
    found = read(tmp_path, NUMBERED % ", header: false")
    assert boxes(found) == {"a.png": [(10, 10, 30, 30), (50, 50, 70, 70)], "b.png": [(20, 20, 40, 40)]}
    assert found.items[1].where.endswith("a.csv:3")
    put(tmp_path / "a.csv", "0,1,2,3,4,5\n" + ROWS)  # pandas writes such titles
    assert boxes(read(tmp_path, NUMBERED % "")) == boxes(found)


def test_lists_without_titles_lose_no_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    put(tmp_path / "n.csv", "b.png\nc.png\n")
    listed = "negatives: {listed: {files: n.csv, file: 0%s}}\n"
    (fault,) = read(tmp_path, CSV % "", extra=listed % "").faults.messages
    assert "'b.png' in column 0 (negatives.listed.file)" in fault and "negatives.listed.header: false" in fault
    assert set(boxes(read(tmp_path, CSV % "", extra=listed % ", header: false"))) == {"a.png", "b.png", "c.png"}
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\nb.png,10,20,30,40,nod\n")
    left_out = ", leave_out_listed: {files: n.csv, file: 0%s}"
    (fault,) = read(tmp_path, CSV % (left_out % "")).faults.messages
    assert "annotations.leave_out_listed.header: false" in fault
    assert set(boxes(read(tmp_path, CSV % (left_out % ", header: false")))) == {"a.png"}


def test_a_tab_in_single_quotes_is_a_tab(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", (HEAD + "a.png,10,20,30,40,nod\n").replace(",", "\t"))
    assert boxes(read(tmp_path, CSV % ", delimiter: '\\t'")) == {"a.png": [BOX]}


@pytest.mark.parametrize("given", ["''", "'||'", "'\"'", r'"\n"'])
def test_a_delimiter_is_one_character(given: str, tmp_path: Path) -> None:
    with pytest.raises(UmedError, match="delimiter.*needed: one character"):
        read(tmp_path, CSV % f", delimiter: {given}")


def test_shares_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(UmedError, match="fractions.*sum to nan; needed: 1"):
        read(tmp_path, CSV % "", "{by: patient, fractions: {train: .nan, test: 0.5}}")


@pytest.mark.parametrize("window", ["400, 40", "nan, 5", "0, inf", "5, 5", "wide"])
def test_a_window_is_two_numbers_of_which_the_first_is_less(window: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", f'f,x1,y1,x2,y2,c,w\na.png,10,20,30,40,nod,"{window}"\n')
    (fault,) = read(tmp_path, CSV.replace("lesion: c", "lesion: c, window: w") % "").faults.messages
    assert f'a.csv:2: window is {window!r}; needed: "low, high"' in fault


BY_COLUMN = "{by: column}"
WITH_PATIENT = "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c, patient: p, split: s}}"


def test_a_patient_that_pandas_made_a_float_is_the_same_patient(tmp_path: Path) -> None:
    for name in "abcd":
        put(tmp_path / f"{name}.png")
    put(tmp_path / "a.csv", "f,x1,y1,x2,y2,c,p\na.png,10,20,30,40,nod,0.0\nb.png,10,20,30,40,nod, 1.0\n")
    put(tmp_path / "n.csv", "f,p\nc.png,0\nd.png,01\n")
    annotations = WITH_PATIENT.replace(", split: s", "")
    found = read(tmp_path, annotations, extra="negatives: {listed: {files: n.csv, file: f, patient: p}}\n")
    assert [item.patient for item in found.items] == ["0", "1", "0", "01"]
    (remark,) = [line for line in found.faults.remarks if "leading zeros" in line]
    assert "differ only by leading zeros or case, such as '01' and '1' (1 in all)" in remark


def test_a_patient_in_two_splits_is_told_when_it_is_read(tmp_path: Path) -> None:
    """Not by the check alone: people build without one."""
    rows = "a.png,10,20,30,40,nod,P1,train\nb.png,10,20,30,40,nod,P1,test\n"
    for name in "ab":
        put(tmp_path / f"{name}.png")
    put(tmp_path / "a.csv", "f,x1,y1,x2,y2,c,p,s\n" + rows)
    (remark,) = [
        line for line in read(tmp_path, WITH_PATIENT, BY_COLUMN).faults.remarks if "more than one split" in line
    ]
    assert remark.startswith("split: 1 patient is in more than one split (P1): results on test")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("x,no", "n.csv:3: has 2 cells, and the header has 3"),  # a file that was cut off
        ("x,no\n", ""),  # Excel leaves out empty cells
        ("x,b.png,no,effusion\n", "n.csv:3: has 4 cells, and the header has 3. Put text that holds ',' into quotes"),
        ("x,no,a.png,", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("key", ["negatives", "leave_out_listed"])
def test_rows_of_lists_are_whole(key: str, row: str, words: str, tmp_path: Path) -> None:
    """The twin of the rule for the annotations' own rows: an unquoted comma moves the cells behind it."""
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    put(tmp_path / "n.csv", f"text,what,f\nx,no,b.png\n{row}")
    files = "{files: n.csv, file: %s%s}"
    listed = files % ("f", ", only_rows: {what: ['no']}") if key == "negatives" else files % ("f", "")
    rule = "" if key == "negatives" else f", {key}: {listed}"
    found = read(tmp_path, CSV % rule, extra=f"negatives: {{listed: {listed}}}\n" if key == "negatives" else "")
    assert [words in message for message in found.faults.messages] == ([True] if words else [])


@pytest.mark.parametrize(
    ("text", "header", "words"),
    [
        ("b.png\nc.png,x\n", "false", "n.csv:2: has 2 cells, and the first line has 1."),
        (
            "f,w\n1,b.png,x\n2,c.png,x\n",
            "true",
            "n.csv: all rows have 3 cells, and the header has 2. If the first column",
        ),
        ("f,w\nb.png,x,y\nc.png,x\n", "true", "n.csv:2: has 3 cells, and the header has 2. Put text that holds"),
        ("f,w\nb.png,x,\nc.png,x,y\n", "true", "n.csv:3: has 3 cells, and the header has 2. Put text that holds"),
        ("w,f\nb.png\nc.png\n", "true", "n.csv:2: has 1 cells, and the header has 2. Is the file whole"),
    ],
    ids=["no header", "R's", "too long", "one too long", "all short"],
)
def test_rows_of_another_length_are_told_by_what_the_file_has(
    text: str, header: str, words: str, tmp_path: Path
) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "a.csv", HEAD + "a.png,10,20,30,40,nod\n")
    put(tmp_path / "n.csv", text)
    column = "0" if header == "false" else "f"
    listed = f"negatives: {{listed: {{files: n.csv, file: {column}, header: {header}}}}}\n"
    assert read(tmp_path, CSV % "", extra=listed).faults.messages[0].split("/")[-1].startswith(words)
    if "all rows" in words:
        put(tmp_path / "a.csv", HEAD + "1,a.png,10,20,30,40,nod\n")
        (fault,) = read(tmp_path, CSV % "").faults.messages
        assert "a.csv: all rows have 7 cells, and the header has 6. If the first column has no title" in fault


@pytest.mark.parametrize(("value", "words"), [("no", "found False"), ("2", "found 2"), ("1.50", "found 1.5")])
def test_a_value_that_yaml_takes_for_something_else_wants_quotes(value: str, words: str, tmp_path: Path) -> None:
    put(tmp_path / "a.csv", HEAD)
    with pytest.raises(UmedError, match=f"annotations.only_rows.c.0: {words}.*Put it into quotes"):
        read(tmp_path, CSV % f", only_rows: {{c: [{value}]}}")
