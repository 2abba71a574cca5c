"""The plausibility table of ``umed recipe check``: one row a kind, with its number and examples, and what was looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from support.drawn import scene, write_png, write_recipe

from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.checking.plausibility import LOOKED_AT, plausibility
from umed_plugin.data.checking.report import print_check
from umed_plugin.data.recipes.recipe import load_recipe

pytestmark = pytest.mark.one_stack
CSV = "{reader: csv, files: a.csv, columns: {file: f, box: [x1, y1, x2, y2], lesion: c, patient: p, split: s}%s}"
HEAD = "f,x1,y1,x2,y2,c,p,s\n"


def recipe_file(folder: Path, rows: str, more: str = "", extra: str = "") -> Path:
    for name in {row.split(",")[0] for row in rows.splitlines()}:
        write_png(folder / name, scene((11, 7, 30 + len(name), 19)))
    (folder / "a.csv").write_text(HEAD + rows)
    return write_recipe(folder, CSV % more, "{by: column}", extra)


@pytest.mark.llava
def test_one_row_for_each_kind(tmp_path: Path) -> None:
    rows = "1.png,10,20,30,40,nod,p1,train\n1.png,11,20,30,40,nod,p1,train\n1.png,50,50,50.5,60,nod,p1,train\n"
    rows += "22.png,10,20,30,40,nod,p1,val\n22.png,10,20,30,40,nod,p1,val\n333.png,,,,,,p3,train\n"
    more = ", split_values: {train: train, val: val, test: test}"
    check = check_recipe(load_recipe(recipe_file(tmp_path, rows, more, "negatives: drop\n")))
    assert check.ok
    found = {row.what: (row.count, row.of, list(row.examples)) for row in plausibility(check)}
    assert found["boxes under a pixel wide or high"] == (1, 4, ["train: drawn/1.png"])
    assert found["boxes that overlap another of their class by more than half"] == (1, 4, ["train: drawn/1.png"])
    assert found["splits that are asked for and empty"] == (1, None, ["test"])
    assert found["patients in more than one split"] == (1, 1, ["drawn p1"])
    assert found["images left out: negative"] == (1, None, [])
    assert found["images in train, all with a lesion: a model may learn to see one in every image"] == (1, None, [])
    assert found["boxes left out: the same box of the same class twice"] == (1, None, [])
    count, _, (unused, *_) = found["rules or options without effect"]
    assert count == 2
    assert "annotations.split_values: nothing in the data is 'test'" in unused
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_check(check, console)
    text = console.export_text()
    assert text.index("Plausibility") < text.index("Looked at: boxes under a pixel, ") < text.index("The recipe fits")
    assert "images left out: negative" in text


@pytest.mark.llava
def test_without_a_finding_only_what_was_looked_at_is_said(tmp_path: Path) -> None:
    rows = "1.png,10,20,30,40,nod,p1,train\n22.png,10,20,30,40,cy,p2,val\n333.png,,,,,,p3,train\n"
    check = check_recipe(load_recipe(recipe_file(tmp_path, rows)))
    check.split_leaks = []
    assert plausibility(check) == []
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_check(check, console)
    text = console.export_text()
    assert "Plausibility" not in text
    assert f"Looked at: {', '.join(LOOKED_AT)}." in text


@pytest.mark.llava
def test_a_test_split_that_is_too_small_to_tell_is_named(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,10,20,30,40,nod,p{i // 2},test\n" for i in range(8))
    small = {row.what: row.count for row in plausibility(check_recipe(load_recipe(recipe_file(tmp_path, rows))))}
    assert small["patients in test, fewer than 5: no intervals"] == 4
    assert small["images in test, all with a lesion: false boxes cannot be counted"] == 8
    rows = "".join(f"{i}.png,10,20,30,40,nod,p{i},test\n" for i in range(6)) + "n.png,,,,,,p9,test\n"
    found = [row.what for row in plausibility(check_recipe(load_recipe(recipe_file(tmp_path, rows))))]
    assert "patients in test, fewer than 30: unsure intervals" in found
    assert not any("all with a lesion" in what for what in found)


def test_too_few_means_what_it_means_in_an_evaluation() -> None:
    from umed_plugin.data.checking import plausibility as checking
    from umed_plugin.evaluation.metrics import metric

    assert (checking._FEWEST, checking._FEW) == (metric.FEWEST, metric.FEW)


@pytest.mark.llava
def test_a_patient_with_most_images(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,10,20,30,40,{'nod' if i % 2 else 'cy'},{'p' if i < 8 else i},train\n" for i in range(12))
    check = check_recipe(load_recipe(recipe_file(tmp_path, rows)))
    (row,) = [row for row in plausibility(check) if "most of the data" in row.what]
    assert (row.count, row.of, row.examples) == (8, 12, ["drawn p"])
