"""The generated studies, the small checkpoint, and the demo from start to end in a tiny setting."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import demo_table
import numpy as np
import pytest
import stock_template
import torch
from support import forked
from transformers import AutoTokenizer

from umed_plugin.cli import main
from umed_plugin.commands import processes
from umed_plugin.commands.demo.pipeline import STAGES, DemoSettings, environment, run_demo
from umed_plugin.commands.demo.prior import caption_records, corpus
from umed_plugin.commands.demo.studies import LESIONS, draw_study, make_studies
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
from umed_plugin.errors import UmedError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_same_seed_writes_the_same_studies(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_studies(tmp_path / name, seed=seed, train=4, val=2, test=2)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".csv", ".dcm", ".gz", ".png"}
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert any((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)


def test_splits_are_by_patient_and_a_patient_has_several_studies(tmp_path):
    table = rows(make_studies(tmp_path, seed=0, train=8, val=4, test=4))
    splits = {
        row["patient"]: {other["split"] for other in table if other["patient"] == row["patient"]} for row in table
    }
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == 4 and len({row["file"] for row in table}) == 16
    for row in table:
        assert (row["slice"] != "") == row["file"].endswith(".nii.gz")
        assert (row["lesion"] == "") == (row["x1"] == "")


def test_a_box_holds_its_lesion_and_nothing_of_it_lies_outside():
    seen = set()
    for index in range(60):
        picture, lesions = draw_study(np.random.default_rng(index))
        plain = picture.copy()
        for lesion in lesions:
            x1, y1, x2, y2 = lesion.box
            assert 0 < x1 < x2 < picture.shape[1] and 0 < y1 < y2 < picture.shape[0]
            inside = picture[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean()
            around = np.concatenate(
                [picture[y1 - 4 : y1 - 1, x1:x2].ravel(), picture[y2 + 1 : y2 + 4, x1:x2].ravel()]
            ).mean()
            assert (inside < around - 0.1) if lesion.name == "cyst" else (inside > around + 0.1)
            plain[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2] = 0.4
            seen.add(lesion.name)
        assert plain.max() < 0.72, "no bright lesion is left where no box is"
    assert seen == set(LESIONS)


def test_about_one_study_in_eight_has_no_lesion_and_one_in_six_has_two():
    counts = np.array([len(draw_study(np.random.default_rng([7, index]))[1]) for index in range(400)])
    assert 0.07 < (counts == 0).mean() < 0.18
    assert 0.10 < (counts == 2).mean() < 0.24


def test_captions_name_what_is_there_and_give_no_box():
    record = {
        "id": "1",
        "image": "1.png",
        "image_size": [100, 100],
        "terms": {"cyst": ["cyst"]},
        "objects": {"ref": ["cyst"], "bbox": [[70, 10, 90, 20]]},
        "provenance": {"image_aspect_ratio": "pad"},
    }
    [made] = caption_records([record])
    assert made["conversations"][1]["value"] == "The image shows cyst in the upper right."
    assert set(made) == {"id", "image", "conversations"}


def test_the_checkpoint_is_as_its_seed_says_and_its_tokenizer_splits_digits(tmp_path):
    first, again = (make_checkpoint(tmp_path / name, seed=5, corpus=corpus(0, 40)) for name in ("a", "b"))
    for file in ("model.safetensors", "tokenizer.model", "vision_tower/model.safetensors"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(first, use_fast=False)
    text = "It lies at [0.61, 0.36, 0.92, 0.83]. é"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2 and tokenizer.unk_token_id == 0
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece.strip("▁")) == 1 for piece in pieces if any(c.isdigit() for c in piece) and piece[0] != "<")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(UsageError, match="Did you mean 'mistral'"):
        make_checkpoint(tmp_path / "c", family="mistrall")


@pytest.mark.run
def test_threads_of_a_process_that_has_prepared_nothing_make_checkpoints(tmp_path):
    """Some benchmarks make them before they start any command of ours, and of several seeds side by side."""
    made = """
from concurrent.futures import ThreadPoolExecutor
from umed_plugin.commands.demo.tiny_checkpoint import make_checkpoint
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda seed: make_checkpoint(f"{seed}-llava-mistral", seed=seed), (5, 6, 7)))
"""
    subprocess.run([sys.executable, "-c", made], check=True, cwd=tmp_path, env=environment())
    for seed in (5, 6, 7):
        alone = make_checkpoint(tmp_path / f"alone{seed}-llava-mistral", seed=seed)
        for file in ("model.safetensors", "vision_tower/model.safetensors"):
            assert (tmp_path / f"{seed}-llava-mistral" / file).read_bytes() == (alone / file).read_bytes()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UmedError, match="is not empty"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.run
def test_the_demo_runs_from_start_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=forked.popen, STDOUT=subprocess.STDOUT))
    # Threads of a model this small wait for one another, in this test and in all that follow in this process.
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    settings = DemoSettings(
        tuning=16,
        rewarding=8,
        val=4,
        test=8,
        prior_epochs=1,
        tuning_epochs=1,
        rewarding_steps=10,
        queries=2,
        candidates=2,
        max_new_tokens=12,
    )
    out = tmp_path / "demo"
    returned = run_demo(out, seed=0, settings=settings)
    summary = json.loads((out / "summary.json").read_text())
    assert summary == returned and threads == [settings.processes]
    assert list(summary) == [*STAGES, "comparison", "seed", "seconds"]
    for stage in STAGES:
        assert summary[stage]["n"] == 8
        for metric in ("accuracy", "mean_iou", "acc_at_50", "vision_relevance"):
            value, interval = summary[stage][metric], summary[stage][f"{metric}_ci95"]
            how = summary[stage]["intervals"][metric]
            assert how["units"] == 2 and how["interval"] in ("exact", "too few"), "two patients are too few"
            assert (interval is None) == (how["interval"] == "too few")
            assert interval is None or 0 <= interval[0] <= value <= interval[1] <= 1
        assert len((out / "evaluation" / stage / "predictions.jsonl").read_text().splitlines()) == 8
    assert set(summary["comparison"]["mean_iou"]) == {"difference", "ci95", "n", "units", "interval"}
    assert (out / "checkpoint" / "llava-mistral-umed" / "config.json").is_file()
    page = (out / "report.html").read_text()
    assert all(text in page for text in ("stage 2 − stage 1", "reward/localization", "guard/length_ratio"))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert len(data["studies"]) == 8 and all(study["picture"] for study in data["studies"])
    assert [row["reward"] is not None for row in data["candidates"][0]["rows"]] == [True, True]
    assert data["candidates"][0]["picture"] and f"report: {out / 'report.html'}" in capsys.readouterr().out.replace(
        "\n", ""
    )

    # The command that makes the README's picture, as docs/results.md has it, on this run.
    (command,) = re.findall(
        r"^umed report runs/\S+ --picture .*$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE
    )
    picture = tmp_path / "docs" / "before_after.png"
    words = command.replace("docs/before_after.png", str(picture)).split()[1:]
    assert main([str(out) if word.startswith("runs/") else word for word in words]) == 0
    assert picture.read_bytes() == (out / "before_after.png").read_bytes() and picture.stat().st_size < 300_000
    assert (ROOT / "docs" / "before_after.png").stat().st_size < 300_000

    # A study depends on the seed and its number alone: of more held-out studies the first are the demo's own.
    demo_table.main([str(out), "--studies", "10"])
    more = (out / "held-out-10" / "evaluation" / "rewarding" / "predictions.jsonl").read_text().splitlines()
    own = (out / "evaluation" / "rewarding" / "predictions.jsonl").read_text().splitlines()
    seen = [[(study["true_boxes"], study["boxes"]) for study in map(json.loads, lines)] for lines in (more, own)]
    assert len(more) == 10 and seen[0][:8] == seen[1]
    assert f"| {out.name} |" in capsys.readouterr().out

    stock_template.main(out)
    assert re.search(r"^accuracy: plugin [01]\.\d{3}, stock LLaVA [01]\.\d{3}, ", capsys.readouterr().out, re.MULTILINE)
