"""The page docs/pseudo-boxes.md and the shipped recipes of labels, on made-up images. Tower, folders and steps are swapped."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pages import DOCS, blocks, commands
from support.source_files import write_kvasir, write_nih, write_sources

from umed_plugin.cli import main
from umed_plugin.commands.upgrade.settings_file import read_settings
from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.recipes.recipe import load_recipe, shipped_recipes
from umed_plugin.data.records import load_records
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
PAGE = DOCS / "pseudo-boxes.md"
V2 = {
    **dict.fromkeys(("normal-cecum", "normal-pylorus", "normal-z-line"), 4),
    **dict.fromkeys(("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "polyps", "ulcerative-colitis"), 3),
}


def frame(path: Path, number: int, spot: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).normal((150, 80, 70), 8, (60, 80, 3))
    if spot:
        pixels[20:35, 30 : 50 + number % 20] += 80
    Image.fromarray(np.uint8(np.clip(pixels, 0, 255))).save(path, quality=92)


def write_kvasir_v2(root: Path) -> None:
    """Frames in the eight folders of Kvasir v2; one of its polyps is a frame of Kvasir-SEG, under another name."""
    for number, (name, count) in enumerate(V2.items()):
        for index in range(count):
            frame(root / name / f"{number}{index}.jpg", 10 * number + index, "normal" not in name)


def write_labelled_nih(root: Path) -> None:
    """As `write_nih`, with six more X-rays that have a label and no box, one of them two labels."""
    write_nih(root, positives=8, negatives=12)
    rows = (root / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    for number in range(6):
        name = f"{900 + number:08}_000.png"
        shutil.copy(min((root / "images_001" / "images").glob("*.png")), root / "images_001" / "images" / name)
        with Image.open(root / "images_001" / "images" / name) as image:
            pixels = np.asarray(image).copy()
        pixels[200:400, 100 * number : 100 * number + 150] = 240
        Image.fromarray(pixels).save(root / "images_001" / "images" / name, compress_level=1)
        rows.append(f"{name},{'Mass|Nodule' if number == 0 else 'Fibrosis'},0,{900 + number}")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows) + "\n")


def test_kvasir_v2_has_five_findings_and_three_normal_places(tmp_path: Path) -> None:
    write_kvasir_v2(tmp_path)
    found = read_annotations(load_recipe("kvasir_v2"), tmp_path)
    assert found.faults.messages == []
    assert len(found.normals) == 12
    counts = Counter(name for item in found.items for name in item.labels)
    assert counts == dict.fromkeys(
        ("dyed lifted polyp", "dyed resection margin", "esophagitis", "polyp", "ulcerative colitis"), 3
    )


def test_nih_labels_leave_out_what_has_a_true_box(tmp_path: Path) -> None:
    write_labelled_nih(tmp_path)
    found = read_annotations(load_recipe("nih_cxr14_labels"), tmp_path)
    assert found.faults.messages == []
    assert found.left_out["listed in BBox_List_2017.csv (annotations.leave_out_listed)"] == 8
    assert Counter(tuple(item.labels) for item in found.items) == {
        (): 2,  # per_positive 0.5 of the 6, in each split
        ("mass", "nodule"): 1,
        ("fibrosis",): 5,
    }
    assert len(found.normals) == 12, "the map may learn from those above per_positive"
    boxed = read_annotations(load_recipe("nih_cxr14"), tmp_path)
    split = {item.image.name[:8]: item.split for item in boxed.items}
    assert all(split.get(item.image.name[:8], item.split) == item.split for item in found.items)


def shorter(name: str) -> str:
    text = shipped_recipes()[name].read_text()
    text = text.replace("shots: 32}", "shots: 32, steps: 2, least_score: 0.0}")
    text = text.replace("  shots: 48 ", "  steps: 2\n  least_score: 0.0\n  shots: 48 ")
    assert "steps: 2" in text
    return text


@pytest.mark.llava
def test_the_pages_mixture_is_built(tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "mau"
    write_sources(root)
    shutil.rmtree(root / "NIH")
    write_labelled_nih(root / "NIH")
    write_kvasir_v2(root / "kvasir-dataset-v2")
    shutil.copy(min((root / "Kvasir-SEG" / "images").iterdir()), root / "kvasir-dataset-v2" / "polyps" / "the-same.jpg")
    monkeypatch.chdir(tmp_path)
    mixture = shipped_recipes()["mau_labels"].read_text()
    for name in ("nih_cxr14_labels", "kvasir_v2"):
        Path(f"{name}.yaml").write_text(shorter(name).replace("train: 0.8", "train: 1"))
        mixture = mixture.replace(f"  {name}:", f"  {name}.yaml:")
    Path("mau_labels.yaml").write_text(
        mixture.replace("{train: 0.8, val: 0.1, test: 0.1}", "{train: 1}").replace(
            "negative_share: 0.1", "negative_share: 0.3"
        )
    )
    (command,) = [command for command in commands(PAGE) if "mau_labels" in command]
    words = shlex.split(command.replace("checkpoints/llava-med-v1.5-mistral-7b", str(tower)))
    words[words.index("mau_labels")] = "mau_labels.yaml"
    assert main([*words[1:], "--quiet"]) == 0
    records = load_records(root / "built" / "mau_labels.json")
    kinds = Counter((record["source"], record["provenance"].get("boxes")) for record in records)
    assert kinds["kvasir_v2", "pseudo"] > 0 and kinds["nih_cxr14_labels", "pseudo"] > 0
    assert {source for source, _ in kinds} == {
        *("deeplesion", "kidney_stone", "nih_cxr14_labels", "tbx11k", "kvasir_v2"),
    }
    pseudo = [record for record in records if record["source"] in ("nih_cxr14_labels", "kvasir_v2")]
    assert all((record["provenance"].get("boxes") == "pseudo") == bool(record["objects"]["bbox"]) for record in pseudo)
    assert not any("the-same" in record["id"] for record in records), "a frame of Kvasir-SEG"


@pytest.mark.llava
def test_the_pages_example_runs(tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, upgrade = blocks(PAGE, "yaml")
    for number in range(24):
        frame(Path("frames") / ("normal", "polyps", "ulcers")[number % 3] / f"{number}.jpg", number, number % 3 > 0)
    Path("frames.yaml").write_text(recipe.replace("shots: 16", "shots: 16, steps: 3, least_score: 0.0"))
    for command in commands(PAGE):
        if "frames.yaml" in command:
            words = shlex.split(command.replace("checkpoints/llava-med-v1.5-mistral-7b", str(tower)))
            assert main([*words[1:], "--quiet"]) == 0
    records = load_records("frames_built/train.json")
    assert {record["provenance"].get("boxes") for record in records if record["objects"]["bbox"]} == {"pseudo"}
    assert Path("frames_built/train.pseudo_boxes.png").is_file()

    Path("Kvasir-SEG").mkdir()
    write_kvasir(Path("Kvasir-SEG"), count=2)
    Path("run.yaml").write_text(upgrade)
    settings = read_settings(Path("run.yaml"), {})
    assert settings.evaluation.data_root == str(tmp_path / "Kvasir-SEG")
    Path("run.yaml").write_text(upgrade.partition("evaluation")[0])
    with pytest.raises(UmedError, match="evaluation.recipe: missing. .*frames.yaml has pseudo_boxes"):
        read_settings(Path("run.yaml"), {})
    with pytest.raises(
        UmedError, match="evaluation.recipe: .*frames.yaml has pseudo_boxes. Needed: a recipe with true"
    ):
        read_settings(Path("run.yaml"), {"evaluation.recipe": "frames.yaml"})
    with pytest.raises(UmedError, match="evaluation.data_root: has no effect without evaluation.recipe"):
        read_settings(Path("run.yaml"), {"evaluation.data_root": "frames"})
