"""Mixtures: `mau` on made-up sources; how shares are dealt; what is missing is told for every source."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from support.source_files import write_sources

from umed_plugin import cli
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.annotations.mixing import dealt
from umed_plugin.data.build import build_records
from umed_plugin.data.checking.check import check_recipe
from umed_plugin.data.checking.report import print_check
from umed_plugin.data.recipes.recipe import Mixture, load_recipe, shipped_recipes
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
SOURCES = ("deeplesion", "kidney_stone", "nih_cxr14", "tbx11k", "kvasir_seg")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


def mau_of(size: int, folder: Path, *changes: tuple[str, str]) -> Mixture:
    text = shipped_recipes()["mau"].read_text()
    for old, new in (("size: 5817", f"size: {size}"), *changes):
        assert old in text
        text = text.replace(old, new)
    (folder / "mau.yaml").write_text(text)
    mixture = load_recipe(folder / "mau.yaml")
    assert isinstance(mixture, Mixture)
    return mixture


@pytest.mark.parametrize(
    ("size", "available", "shares", "expected"),
    [
        (10, {"a": 50, "b": 50}, {"a": 1, "b": 1}, {"a": 5, "b": 5}),
        (10, {"a": 50, "b": 50}, {"a": 3, "b": 1}, {"a": 8, "b": 2}),
        (10, {"a": 2, "b": 50, "c": 50}, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 4, "c": 4}),
        (10, {"a": 2, "b": 3, "c": 50}, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 3, "c": 5}),
        (10, {"a": 2, "b": 3}, {"a": 1, "b": 1}, {"a": 2, "b": 3}),
        (10, {"a": 0, "b": 3}, {"a": 1, "b": 1}, {"a": 0, "b": 3}),
        (11, {"a": 9, "b": 9, "c": 9}, {"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 4, "c": 3}),
        (0, {"a": 9}, {"a": 1}, {"a": 0}),
        # The five sources of the paper, as far as they have boxes: DeepLesion fills up what the others lack.
        (
            5817,
            {"deeplesion": 9500, "kidney": 1300, "nih": 880, "tbx": 799, "kvasir": 1000},
            dict.fromkeys(("deeplesion", "kidney", "nih", "tbx", "kvasir"), 1.0),
            {"deeplesion": 1838, "kidney": 1300, "nih": 880, "tbx": 799, "kvasir": 1000},
        ),
    ],
)
def test_shares(size: int, available: dict[str, int], shares: dict[str, float], expected: dict[str, int]) -> None:
    assert dealt(size, available, shares) == expected


def test_mau_names_the_papers_sources_and_size() -> None:
    mixture = load_recipe("mau")
    assert isinstance(mixture, Mixture)
    assert tuple(mixture.recipes) == SOURCES
    assert mixture.size == 5817
    assert "kidney stone" in mixture.names
    assert "polyp" in mixture.names
    assert {recipe.split.by for recipe in mixture.recipes.values()} == {"patient"}
    assert all(recipe.split.fractions == mixture.split.fractions for recipe in mixture.recipes.values())


@pytest.mark.llava
def test_mau_on_made_up_sources(sources: Path, tmp_path: Path) -> None:
    mixture = mau_of(60, tmp_path)
    records = build_records(mixture, out_dir=tmp_path / "out", data_root=sources)
    assert len(records) == 60
    kinds = Counter((record["source"], record["answer_type"]) for record in records)
    assert kinds["nih_cxr14", "negative"] + kinds["tbx11k", "negative"] == 6
    with_lesion = [kinds[source, "grounded"] for source in SOURCES]
    assert sum(with_lesion) == 54
    assert max(with_lesion) - min(with_lesion) <= 1
    for record in records:
        assert record["provenance"]["mixture"] == f"mau {mixture.sha256}"
        assert record["provenance"]["recipe"] == record["source"] == record["id"].split("/")[0]
        assert set(record["objects"]["ref"]) <= set(record["terms"])
    assert [record["id"] for record in build_records(mixture, out_dir=tmp_path / "out", data_root=sources)] == [
        record["id"] for record in records
    ]
    other = mau_of(60, tmp_path, ("seed: 0", "seed: 1"))
    assert {record["id"] for record in build_records(other, out_dir=tmp_path / "out", data_root=sources)} != {
        record["id"] for record in records
    }


def test_a_patient_is_in_one_split_whatever_the_mixture_chooses(sources: Path, tmp_path: Path) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for size in (20, 60, 5000):
        for item in read_annotations(mau_of(size, tmp_path), sources).items:
            splits.setdefault((item.recipe.name, item.patient), set()).add(item.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "val", "test"}


@pytest.mark.llava
def test_more_is_asked_for_than_there_is(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = mau_of(5000, tmp_path)
    records = build_records(mixture, out_dir=tmp_path / "out", data_root=sources)
    warnings = capsys.readouterr().err
    assert f"umed: warning: mau: 5000 images wanted, {len(records)} found" in warnings
    assert "deeplesion: holds an ignored class" in warnings
    assert "4 degenerate boxes left out" in warnings


@pytest.mark.llava
def test_sources_that_are_not_there_are_named_all_at_once(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("KidneyStone", "TBX11K", "Kvasir-SEG"):
        (tmp_path / "data" / name).symlink_to(sources / name)
    with pytest.raises(UmedError) as caught:
        build_records(load_recipe("mau"), out_dir=tmp_path / "out", data_root=tmp_path / "data")
    assert "2 faults" in str(caught.value)
    assert f"{tmp_path}/data/DeepLesion: no such folder. Get deeplesion (NIH DeepLesion terms" in str(caught.value)
    assert "https://nihcc.app.box.com/v/ChestXray-NIHCC" in str(caught.value)
    with pytest.raises(UmedError, match=r"there is no data folder .* It holds DeepLesion/, KidneyStone/, NIH/"):
        load_recipe("mau").root("/nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            [("kvasir_seg:", "kvasir_sge:")],
            "sources.kvasir_sge: unknown recipe 'kvasir_sge'. Did you mean 'kvasir_seg'?",
        ),
        ([("kvasir_seg:", "mau:")], "sources.mau: is a mixture itself; name its sources here"),
        ([("folder: NIH,", "floder: NIH,")], "sources.nih_cxr14.floder: unknown key 'floder'. Did you mean 'folder'?"),
        ([("negative_share: 0.1", "negative_share: 1.5")], "negative_share: found 1.5"),
        ([("share: 1}", "share: 0}")], "sources.deeplesion.share: found 0"),
        ([("train: 0.8", "train: 0.7")], "split.fractions: sum to 0.9; needed: 1"),
        ([("size: 5", "recipes: {}\nsize: 5")], "recipes: is filled in by umed"),
    ],
)
def test_mistakes_in_a_mixture(tmp_path: Path, changes: list[tuple[str, str]], words: str) -> None:
    text = shipped_recipes()["mau"].read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UmedError) as caught:
        load_recipe(tmp_path / "own.yaml")
    assert words in str(caught.value)


def test_a_source_may_be_a_file_beside_the_mixture(sources: Path, tmp_path: Path) -> None:
    text = shipped_recipes()["kvasir_seg"].read_text().replace("name: polyp", "name: growth")
    (tmp_path / "mine.yaml").write_text(text)
    mixture = mau_of(60, tmp_path, ("kvasir_seg:", "mine.yaml:"))
    before = mixture.sha256
    assert "growth" in mixture.names
    (tmp_path / "mine.yaml").write_text(text.replace("least_box_side: 6", "least_box_side: 7"))
    assert mau_of(60, tmp_path, ("kvasir_seg:", "mine.yaml:")).sha256 != before


@pytest.mark.llava
def test_the_command_builds_a_mixture(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mau_of(30, tmp_path)
    out = tmp_path / "out" / "mau.json"
    command = ["recipe", "build", str(tmp_path / "mau.yaml"), "--data-root", str(sources), "--out", str(out)]
    assert cli.main(command) == 0
    assert len(json.loads(out.read_text())) == 30
    assert "30 records, 27 with lesions, 3 without" in capsys.readouterr().out


def drawn_mixture(folder: Path, positives: int, negatives: int, rest: str, own: str = "") -> Mixture:
    """One source of images that are on disk in name alone. Every second one with a lesion has a nodule, the others a cyst."""
    rows = [f"p{n}.png,1,2,30,40,{'nodule' if n % 2 else 'cyst'}" for n in range(positives)]
    rows += [f"n{n}.png,,,,," for n in range(negatives)]
    (folder / "a.csv").write_text("\n".join(["file,x1,y1,x2,y2,lesion", *rows]))
    for row in rows:
        (folder / row.split(",")[0]).touch()
    (folder / "one.yaml").write_text(
        'name: one\ndescription: One.\nterms: {licence: CC0, url: "https://example.org"}\nannotations: {reader: csv, files: '
        "a.csv, columns: {file: file, box: [x1, y1, x2, y2], lesion: lesion}}\nclasses: {nodule: {name: nodule}, cyst: "
        f"{{name: cyst}}}}\nsplit: {{by: patient}}\n{own}"
    )
    (folder / "m.yaml").write_text(f"name: m\ndescription: M.\nsources: {{one.yaml: {{folder: .}}}}\n{rest}\n")
    mixture = load_recipe(folder / "m.yaml")
    assert isinstance(mixture, Mixture)
    return mixture


@pytest.mark.parametrize(
    ("size", "positives", "negatives", "expected"),
    [
        (1000, 200, 500, (200, 22)),
        (60, 200, 500, (54, 6)),
        (60, 200, 2, (58, 2)),
        (5, 200, 500, (5, 0)),
        (60, 0, 500, (0, 0)),
    ],
)
def test_negative_share_is_a_maximum(tmp_path: Path, size: int, positives: int, negatives: int, expected) -> None:
    found = read_annotations(
        drawn_mixture(tmp_path, positives, negatives, f"size: {size}\nnegative_share: 0.1"), tmp_path
    )
    without = sum(item.is_negative for item in found.items)
    assert (len(found.items) - without, without) == expected


def test_negative_share_is_a_maximum_after_hold_out_too(tmp_path: Path) -> None:
    rest = "size: 200\nnegative_share: 0.2"
    plain = read_annotations(drawn_mixture(tmp_path, 200, 200, rest), tmp_path)
    held = read_annotations(drawn_mixture(tmp_path, 200, 200, rest + "\nhold_out: {classes: [nodule]}"), tmp_path)
    without = sum(item.is_negative for item in held.items)
    assert without == (len(held.items) - without) // 4
    assert held.left_out["negative above negative_share"] == 40 - without
    assert {i.image for i in held.items if i.split == "test"} == {i.image for i in plain.items if i.split == "test"}


def test_per_positive_is_of_the_images_that_are_not_held_out(tmp_path: Path) -> None:
    drawn_mixture(tmp_path, 200, 300, "size: 1", "negatives: {per_positive: 1}\n")
    text = (tmp_path / "one.yaml").read_text()
    (tmp_path / "one.yaml").write_text(f"{text}hold_out: {{classes: [nodule]}}\n")
    found = read_annotations(load_recipe(tmp_path / "one.yaml"), tmp_path)
    count = Counter((item.split, item.is_negative) for item in found.items)
    assert count["train", True] == count["train", False] < 100 < 200
    (tmp_path / "one.yaml").write_text(text)
    plain = read_annotations(load_recipe(tmp_path / "one.yaml"), tmp_path)
    assert {i.image for i in found.items if i.split == "test"} == {i.image for i in plain.items if i.split == "test"}


def test_an_option_of_a_source_in_a_file_of_its_own_is_told_once(sources: Path, tmp_path: Path) -> None:
    text = shipped_recipes()["kvasir_seg"].read_text()
    assert "\nimage:" not in text
    (tmp_path / "polyps.yaml").write_text(f"{text}image: {{slice_axis: 1}}\n")
    mixture = mau_of(20, tmp_path, ("  kvasir_seg:", "  polyps.yaml:"))
    console = Console(width=500, record=True, file=io.StringIO())
    print_check(check_recipe(mixture, data_root=sources), console)
    lines = console.export_text().split("Plausibility")[0].splitlines()
    (told,) = [line for line in lines if "image.slice_axis" in line]
    assert told.startswith("polyps.yaml: image.slice_axis: has no effect")
