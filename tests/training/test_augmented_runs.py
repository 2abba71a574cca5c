"""``--umed_augment`` in both stages: what an epoch shows depends on seed, epoch and record alone."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn import scene, write_dicom
from support.records import records_of_four_patients, write_records
from support.tuning import make_dataset, make_tokenizer
from support.umed_runs import train_flags, umed_run, weights
from torch.utils.data import DataLoader

from umed_plugin.data.records import record_geometry, true_boxes
from umed_plugin.grounding.boxes import parse_boxes
from umed_plugin.training.attention_loss_data import LesionDataset
from umed_plugin.training.query_reader import QueryReader
from umed_plugin.training.sampler import EpochSampler, NumberedEpochs
from umed_plugin.training.tuning_data import tokenize
from umed_plugin.training.validation import chosen_indices

RULE = {"flips": ["left_right"], "rotation": 5, "zoom": [0.9, 1.3], "share": 1}
STAGES = {
    "instruction_tuning": ("--group_by_modality_length", "True"),
    "rewarding": shlex.split(
        "--umed_num_candidates 2 --umed_max_new_tokens 8 --umed_log_candidates 1 --umed_rewards localization"
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Eight records of four patients, two epochs' worth of batches."""
    return records_of_four_patients(tmp_path / "data", augment=RULE)


def collated(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return items


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in ("input_ids", "labels", "image"))


def test_an_item_depends_on_seed_epoch_and_record_alone(records: Path, tokenizer: Any) -> None:
    dataset = make_dataset(records, tokenizer, umed_augment=True)
    asked = [[3, 3 + 8, 5 + 16], [3 + 8, 5 + 16]]
    alone, by_workers = (
        [
            item
            for batch in DataLoader(dataset, batch_sampler=asked, collate_fn=collated, num_workers=n)
            for item in batch
        ]
        for n in (0, 2)
    )
    assert all(map(same, alone, by_workers)) and len(alone) == 5
    assert same(alone[1], alone[3]) and same(alone[2], alone[4])
    assert not torch.equal(alone[0]["image"], alone[1]["image"]), "the next epoch is another one"
    plain = make_dataset(records, tokenizer)
    assert not torch.equal(plain[3]["image"], alone[0]["image"]) and same(plain[3], plain[3 + 8])

    # Pixels and text are those of the same study.
    study = next(study for study in (dataset.study(4, epoch) for epoch in range(20)) if study.move.left_right)
    before, after = (
        parse_boxes(record["conversations"][1]["value"]) for record in (plain.list_data_dict[4], study.record)
    )
    assert np.allclose(study.move.boxes(before), after, atol=0.0051)
    ids, labels = tokenize(dataset, study.record, dataset.template_of(4))
    shown = next(epoch for epoch in range(20) if dataset.study(4, epoch) == study)
    item = dataset[4 + 8 * shown]
    assert torch.equal(item["input_ids"], ids) and torch.equal(item["labels"], labels)


def test_the_patches_of_the_attention_loss_are_those_of_the_moved_boxes(records: Path, tokenizer: Any) -> None:
    dataset = make_dataset(records, tokenizer, kind=LesionDataset, umed_augment=True, umed_attention_loss=1.0)
    dataset.use_grid(64, 8)
    covers = []
    for epoch in range(3):
        moved = dataset.study(4, epoch).record
        covers.append(record_geometry(moved, 64, 8).patch_cover(true_boxes(moved)))
        assert np.allclose(dataset[4 + 8 * epoch]["lesion_cover"], covers[-1], atol=1e-6)
    assert not np.allclose(covers[0], covers[1]) and not np.allclose(covers[1], covers[2])


def test_held_out_records_and_text_alone_are_as_they_are(records: Path, tokenizer: Any) -> None:
    items = json.loads(records.read_text())
    items[0]["split"] = "val"
    del items[1]["image"]
    items[1]["conversations"][0]["value"] = "Is there anything abnormal?"
    records.write_text(json.dumps(items))
    held_out = make_dataset(records, tokenizer, split="val", umed_augment=True)
    assert same(held_out[0], make_dataset(records, tokenizer, split="val")[0])
    dataset = make_dataset(records, tokenizer, umed_augment=True)
    assert torch.equal(dataset[0]["image"], torch.zeros(3, 64, 64))


def test_the_next_record_takes_the_place_of_a_bad_image_in_every_epoch(records: Path, tokenizer: Any) -> None:
    (records.parent / "3.png").write_bytes(b"no image")
    dataset = make_dataset(records, tokenizer, umed_augment=True, umed_on_bad_image="skip")
    assert same(dataset[3 + 8], dataset[4 + 8]) and not same(dataset[3 + 8], dataset[4])


def test_the_image_cache_holds_images_before_augmentation(records: Path, tokenizer: Any, tmp_path: Path) -> None:
    plain = make_dataset(records, tokenizer, umed_augment=True)
    cached = make_dataset(records, tokenizer, umed_augment=True, umed_image_cache=str(tmp_path / "cache"))
    for _ in range(2):
        assert all(same(plain[i], cached[i]) for i in (1, 9, 17))
    assert (cached.image_cache.hits, cached.image_cache.misses) == (5, 1)


def test_both_readers_number_the_epochs() -> None:
    sampler = NumberedEpochs(EpochSampler(5, seed=1), 5)
    plain = EpochSampler(5, seed=1)
    assert [[i + 5 * epoch for i in plain.order(epoch)] for epoch in range(3)] == [list(sampler) for _ in range(3)]
    sampler.epochs_begun = 7  # a resumed run's
    assert list(sampler) == [i + 35 for i in plain.order(7)] and len(sampler) == 5

    class Asked:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> int:
            return index

    plan = {2: [[4, 0], [1, 3]], 0: [[1, 2]]}
    for numbered, before in ((True, 10), (False, 0)):
        reader = QueryReader(Asked(), list, 0, plan.__getitem__, numbered=numbered)
        assert reader.position(2, [1, 3]) == 1
        assert reader.read(2, 1, 1) == [[1 + before, 3 + before]]
        assert reader.read(0, 0, 1) == [[1, 2]]


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.run
def test_a_resumed_run_with_other_workers_is_the_run_that_was_not_stopped(
    stage: str, records: Path, tiny_mistral, tmp_path
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--umed_stage", stage, "--umed_augment", "True", "--max_steps", "8", "--save_steps", "5", *STAGES[stage]]

    def run(output: Path, *more: str) -> Any:
        command = train_flags(tiny_mistral, records, output, *flags, *more)
        done = umed_run(["python", "-m", "llava.train.train_mem", *command])
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    assert "augmentation: 8 of 8 records are moved, anew in each epoch" in run(whole).stdout
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    run(resumed, "--dataloader_num_workers", "2")
    expected, found = weights(whole), weights(resumed)
    assert set(found) == set(expected) and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if stage == "rewarding":
        # Rewards see the moved boxes, other ones in the second epoch; the log says how the picture was moved.
        lines = [json.loads(line) for line in (whole / "candidates.jsonl").read_text().splitlines()]
        original = {record["id"]: record["objects"]["bbox"] for record in json.loads(records.read_text())}
        with_boxes = [line for line in lines if original[line["id"]]]
        assert with_boxes and all(line["true"]["bbox"] != original[line["id"]] for line in with_boxes)
        assert all(set(line["study"]["augmented"]) >= {"left_right", "angle", "zoom", "shift"} for line in lines)


def test_reports_are_not_moved_and_are_counted(records: Path, tokenizer: Any, capsys: Any) -> None:
    studies = json.loads(records.read_text())
    probes = [{**item, "id": f"probe-{item['id']}", "answer_type": "probe"} for item in studies]
    objects = {"ref": ["nodule"], "bbox": []}
    reports = [{**item, "id": f"report-{item['id']}", "answer_type": "report", "objects": objects} for item in studies]
    records.write_text(json.dumps(studies + probes + reports))
    make_dataset(records, tokenizer, umed_augment=True)
    told = capsys.readouterr().out
    assert "augmentation: 16 of 24 records are moved" in told and "Not moved: reports (8, such as report-" in told


@pytest.mark.parametrize("stage", list(STAGES))
def test_each_stage_says_what_is_not_moved_and_why(stage: str, records: Path, tokenizer: Any, capsys: Any) -> None:
    items = json.loads(records.read_text())
    items[0]["augment"] = {"share": 0}
    items[1]["conversations"][1]["value"] = "A nodule, centre (0.36, 0.33)."
    records.write_text(json.dumps(items))
    random.seed(5), torch.manual_seed(5), np.random.seed(5)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
    make_dataset(records, tokenizer, umed_augment=True, umed_stage=stage)
    told = capsys.readouterr()
    assert "augmentation: 6 of 8 records are moved" in told.out and "warning" not in told.err
    assert "`augment: {share: 0}` (1, such as " in told.out and "boxes or coordinates in another form" in told.out
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and (before[2] == after[2]).all()
    make_dataset(records, tokenizer, umed_augment=True, umed_stage=stage, rank=1)
    assert "augmentation" not in capsys.readouterr().out

    records.write_text(json.dumps([{**item, "augment": {"share": 0}} for item in items]))
    make_dataset(records, tokenizer, umed_augment=True, umed_stage=stage)
    told = capsys.readouterr()
    assert "warning: augmentation: 0 of 8 records are moved" in told.err and "augmentation" not in told.out


def test_held_out_probes_are_not_scored_as_diagnoses(records: Path, tokenizer: Any, capsys: Any) -> None:
    studies = json.loads(records.read_text())
    kinds = ("grounded", "probe")
    held_out = [
        {**item, "id": f"{kind}-{item['id']}", "answer_type": kind, "split": "val"}
        for item in studies
        for kind in kinds
    ]
    records.write_text(json.dumps(studies + held_out))
    scored = make_dataset(records, tokenizer, split="val").list_data_dict
    assert [record["answer_type"] for record in scored] == ["grounded"] * 8
    assert "8 of 16 held-out records have no true boxes, or are probes: they are not scored." in capsys.readouterr().out


def test_the_padding_of_a_plain_item_keeps_its_colour(tmp_path: Path, tokenizer: Any) -> None:
    """It does not say how large its image is."""
    file = write_records(tmp_path, count=1)
    (item,) = json.loads(file.read_text())
    Image.new("RGB", (200, 100), (40, 90, 160)).save(tmp_path / item["image"])
    file.write_text(json.dumps([{**item, "augment": {"brightness": 0.3, "share": 1}}]))
    dataset = make_dataset(file, tokenizer, umed_augment=True)
    before, after = dataset.load_image(0), dataset[0]["image"]
    rows = before.shape[-1] // 4
    assert torch.equal(before[:, :rows], after[:, :rows]) and torch.equal(before[:, -rows:], after[:, -rows:])
    assert not torch.allclose(before[:, rows + 2 : -rows - 2], after[:, rows + 2 : -rows - 2], atol=0.01)

    write_dicom(tmp_path / "a.dcm", scene())  # only the cache reads it
    file.write_text(json.dumps([{**item, "image": "a.dcm", "augment": {"brightness": 0.3, "share": 1}}]))
    dataset = make_dataset(file, tokenizer, umed_augment=True, umed_image_cache=tmp_path / "cache")
    assert dataset[0]["image"].shape == before.shape


def test_a_record_of_a_file_whose_name_is_not_utf_8_is_shown(records: Path, tokenizer: Any) -> None:
    studies = json.loads(records.read_text())
    name = os.fsdecode(b"b-\xff")
    (records.parent / studies[4]["image"]).rename(records.parent / f"{name}.png")
    studies[4] |= {"id": name, "image": f"{name}.png", "patient": name}
    records.write_text(json.dumps(studies))
    flags = {"umed_augment": True, "umed_label_share": 0.9, "umed_image_cache": records.parent / "cache"}
    dataset = make_dataset(records, tokenizer, umed_stock_template_share=0.5, **flags)
    (index,) = [n for n, record in enumerate(dataset.list_data_dict) if record["id"] == name]
    assert dataset[index]["image"].shape == (3, 64, 64)
    assert index in chosen_indices([record["id"] for record in dataset.list_data_dict], 8)
