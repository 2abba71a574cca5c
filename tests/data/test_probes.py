"""Probes: what a pair shares, what is right, which kinds fall out, and what they add to a training split."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support.drawn import write_noise_recipe
from support.probing import NAMES, TERMS, studies

from umed_plugin.data.build import build_records
from umed_plugin.data.probes import (
    FALSE_PREMISE,
    KINDS,
    NONE_OF_THESE,
    NOT_ANSWERABLE,
    REMOVED_OPTION,
    SUGGESTION,
    WRONG_IMAGE,
    make_probes,
    probe_records,
)
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.record_file import make_index
from umed_plugin.data.records import load_records, record_faults, save_records
from umed_plugin.data.writing.merge import needs_text
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack


def pairs(found, kind):
    probes = found.by_kind[kind]
    return list(zip(probes[::2], probes[1::2]))


def test_a_probe_and_its_control_differ_by_the_picture_alone():
    found = make_probes(studies(), seed=1)
    assert set(found.by_kind) == set(KINDS) and not found.fallen_out
    for kind in KINDS:
        for probe, control in pairs(found, kind):
            assert (probe.role, control.role) == ("probe", "control")
            assert probe.text == control.text and probe.options == control.options
            assert probe.right != control.right and probe.shown["image"] != control.shown["image"]


def test_what_is_right_is_what_the_picture_shows():
    for seed in range(3):
        found = make_probes(studies(seed=seed), seed=seed)
        for kind in KINDS:
            for probe, control in pairs(found, kind):
                own, other = (set(one.shown["objects"]["ref"]) for one in (probe, control))
                said, controlled = probe.options[probe.right], control.options[control.right]
                if kind == WRONG_IMAGE:
                    assert said == NOT_ANSWERABLE and not own and {controlled} == other
                elif kind == REMOVED_OPTION:
                    assert said == NONE_OF_THESE and not own & set(probe.options) and {controlled} == other
                elif kind == FALSE_PREMISE:
                    name = probe.stem.split("the ")[-1].rstrip("?")
                    assert said == f"there is no {name}" and name not in own and name in other
                    boxes = zip(control.shown["objects"]["ref"], control.shown["objects"]["bbox"])
                    assert {"left" if box[0] < 40 else "right" for ref, box in boxes if ref == name} == {controlled}
                else:
                    assert kind == SUGGESTION and {said} == own and {controlled} == other
                    assert probe.options[probe.suggested] == controlled != said


def test_the_seed_decides_and_the_right_place_is_everywhere():
    records = studies(200)
    again, other = (make_probes(records, seed=seed) for seed in (0, 5))
    assert make_probes(records, seed=0).by_kind == again.by_kind != other.by_kind
    for kind in KINDS:
        places = Counter(probe.right for probe in again.by_kind[kind])
        shares = [places[place] / places.total() for place in range(len(again.by_kind[kind][0].options))]
        assert max(shares) - min(shares) < 0.15, (kind, shares)


def test_a_wrong_image_of_another_source_shows_none_of_the_options():
    chest = studies(20, source="chest", names=("mass", "nodule"), negatives=0)
    found = make_probes([*studies(20, negatives=0), *chest], kinds=[WRONG_IMAGE])
    assert found.by_kind[WRONG_IMAGE]
    for probe, control in pairs(found, WRONG_IMAGE):
        assert probe.shown["source"] != control.shown["source"]
        assert not set(probe.shown["objects"]["ref"]) & set(probe.options)


def test_kinds_that_cannot_be_made_say_why():
    found = make_probes(studies(10, names=("polyp",), negatives=0))
    assert not found.by_kind and set(found.fallen_out) == set(KINDS)
    told = "\n".join(found.told())
    assert "removed_option: it needs studies of two classes in one source" in told and "found: polyp" in told
    assert "wrong_image: it needs studies of one class, and a negative or a study of another source" in told
    assert "false_premise: it needs a lesion on the left or right of its image" in told
    found = make_probes(studies(10, names=("polyp",), negatives=0.5))
    assert set(found.by_kind) == {WRONG_IMAGE, FALSE_PREMISE}


def test_records_to_train_on_have_equal_parts_and_are_valid():
    records = studies(200, split="train")
    made, _ = probe_records(records, 0.2, seed=0)
    assert len(made) == 40 and len({record["id"] for record in made}) == 40
    assert Counter(record["provenance"]["probe"]["kind"] for record in made) == dict.fromkeys(KINDS, 10)
    assert not [fault for record in made for fault in record_faults(record)]
    assert not any(needs_text(record) for record in made), "GPT-4V writes no answer to a probe"
    answers = {record["conversations"][1]["value"] for record in made}
    assert "None of these." not in answers and "none of these." in answers
    # A kind with too few pairs is filled up by the others.
    few = studies(40, split="train", names=NAMES[:1], negatives=0.1)
    assert len(probe_records(few, 0.5, seed=0)[0]) == 20


def recipe(folder, extra):
    lesions = [("cyst", "nodule", "")[number % 3] if number % 4 else "nodule" for number in range(12)]
    places = [5 if number % 3 else 60 for number in range(12)]
    boxed = [(lesion, (x, 5, x + 30, 40)) for lesion, x in zip(lesions, places)]
    return write_noise_recipe(folder, boxed, side=100, extra=extra)


@pytest.mark.llava
def test_a_recipe_adds_probes_to_the_training_split_alone(tmp_path):
    plain = build_records(load_recipe(recipe(tmp_path, "")), out_dir=tmp_path / "out")
    file = recipe(tmp_path, "probes: {share: 0.5}")
    built = build_records(load_recipe(file), out_dir=tmp_path / "out", seed=3)
    assert len(plain) == 24 and len(built) == 24 + 6
    probes = [record for record in built if record["answer_type"] == "probe"]
    assert {record["split"] for record in probes} == {"train"}
    test_images = {record["image"] for record in built if record["split"] == "test"}
    assert test_images and not test_images & {record["image"] for record in probes}
    assert build_records(load_recipe(file), out_dir=tmp_path / "out", seed=3) == built, "same seed, same records"
    assert build_records(load_recipe(file), out_dir=tmp_path / "out", seed=3, split="train") == [
        record for record in built if record["split"] == "train"
    ]
    of_test = build_records(load_recipe(file), out_dir=tmp_path / "out", split="test")
    assert not [record for record in of_test if record["answer_type"] == "probe"]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("probes: {share: 0}", "probes.share: found 0"),
        ("probes: {share: 0.1, kinds: []}", "probes.kinds: "),
        ("probes: {share: 0.1, kinds: [sugestion]}", "probes.kinds"),
        ("probes: {}", "probes.share: missing. Number of probes and controls"),
    ],
)
def test_a_rule_that_is_wrong_is_named(tmp_path, extra, told):
    with pytest.raises(UmedError) as caught:
        load_recipe(recipe(tmp_path, extra))
    assert told in str(caught.value)


def test_a_file_of_records_knows_its_probes(tmp_path):
    records = studies(20, split="train")
    made, _ = probe_records(records, 0.5, seed=0)
    save_records([*records, *made], tmp_path / "train.json")
    index = make_index(tmp_path / "train.json", "train.json", strict=True, failed=lambda error: UmedError(str(error)))
    assert index.columns["probe"].tolist() == [False] * 20 + [True] * 10
    assert make_probes(load_records(tmp_path / "train.json")).by_kind == make_probes(records).by_kind
    assert json.loads((tmp_path / "train.json").read_text())[-1]["terms"] == TERMS
