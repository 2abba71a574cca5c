"""What a class looks like, in some training questions and in the writer's prompt."""

from __future__ import annotations

from collections import Counter

import pytest
from support.drawn import write_noise_recipe
from support.probing import studies

from umed_plugin.data.annotations import read_annotations
from umed_plugin.data.augmentation.texts import is_templated
from umed_plugin.data.build import build_records
from umed_plugin.data.looks import find_question, looks_question
from umed_plugin.data.recipes.recipe import load_recipe
from umed_plugin.data.writing.checks import Findings
from umed_plugin.errors import UmedError

pytestmark = pytest.mark.one_stack
LOOKS = {"nodule": "a grey disc", "cyst": "a dark ellipse"}


def recipe(folder, extra="", looks="looks: a small bright disc."):
    studies_of = [(lesion, (5, 5, 20, 20)) for lesion in ("cyst", "nodule", "")] * 10
    return load_recipe(write_noise_recipe(folder, studies_of, side=40, nodule=looks, extra=extra))


@pytest.mark.llava
def test_training_studies_of_one_class_are_asked_for_it_and_test_studies_are_not(tmp_path):
    plain = build_records(recipe(tmp_path), out_dir=tmp_path / "out")
    built = build_records(recipe(tmp_path, "looks_share: 1"), out_dir=tmp_path / "out")
    asked = {record["id"]: record["conversations"][0]["value"] for record in built}
    found = Counter()
    for before, record in zip(plain, built):
        assert before["conversations"][1] == record["conversations"][1], "the answer is as without"
        question = asked[record["id"]].removeprefix("<image>\n")
        named = question.startswith("Find: ")
        assert named == (record["split"] == "train" and record["objects"]["ref"] != ["cyst"]), record["id"]
        if named:
            found[question] += 1
            assert is_templated(record), "augmentation writes it again with moved boxes"
    described, bare = "Find: nodule, that is a small bright disc.", "Find: nodule."
    assert set(found) == {described, bare} and found[described] > found[bare]
    assert all("looks" in record for record in built)


def test_the_share_and_the_bare_quarter():
    records = [{**record, "looks": LOOKS} for record in studies(800, names=("nodule", "cyst"))]
    asked = [looks_question(record, 0.5, 0) for record in records]
    able = [len(set(record["objects"]["ref"])) < 2 for record in records]
    assert 0.45 < sum(map(bool, asked)) / sum(able) < 0.55
    bare = sum(text in ("Find: nodule.", "Find: cyst.") for text in asked)
    assert 0.2 < bare / sum(map(bool, asked)) < 0.3
    assert {text for text in asked if "that is" in text} == {find_question(*item) for item in LOOKS.items()}
    assert not any(text for text, one in zip(asked, able) if not one)


@pytest.mark.llava
def test_training_is_never_asked_for_a_class_that_is_held_out(tmp_path):
    extra = "looks_share: 1\nhold_out: {classes: [nodule]}\nprobes: {share: 1, kinds: [wrong_image]}"
    built = build_records(recipe(tmp_path, extra), out_dir=tmp_path / "out")
    training = [record for record in built if record["split"] == "train"]
    found = Counter(record["answer_type"] for record in training)
    assert found == {"grounded": 10, "negative": 10, "probe": 20}
    assert not any("nodule" in turn["value"] for record in training for turn in record["conversations"])
    assert not any("looks" in record for record in training), "augmentation and the writer have it from there"
    assert all(record["looks"] for record in built if record["split"] == "test"), "the benchmark asks for it"


@pytest.mark.parametrize(("share", "told"), [("looks_share: 1", True), ("", False)])
def test_what_a_class_looks_like_may_name_a_held_out_class(tmp_path, share, told):
    held = recipe(tmp_path, f"{share}\nhold_out: {{classes: [cyst]}}", looks="looks: a bright disc beside a cyst.")
    remarks = " ".join(read_annotations(held).faults.remarks)
    assert ("classes.nodule.looks: is 'a bright disc beside a cyst'. With looks_share" in remarks) == told
    assert "so the name of the held-out cyst" in remarks or not told


@pytest.mark.llava
def test_the_writers_prompt_says_what_a_finding_looks_like(tmp_path):
    record = next(
        one for one in build_records(recipe(tmp_path), out_dir=tmp_path / "out") if one["objects"]["ref"] == ["nodule"]
    )
    assert Findings.of(record).lines().endswith(" (in general: a small bright disc)")
    del record["looks"]
    assert Findings.of(record).lines().endswith("]"), "the request of an earlier build is not paid for again"


@pytest.mark.parametrize(
    ("extra", "looks", "told"),
    [
        ("looks_share: 0.5", "synonyms: [dot]", "looks_share: has no effect: no class has looks"),
        ("looks_share: 1.5", "looks: a dot", "looks_share: found 1.5"),
        ("", "looks: A dot. It is bright.", "classes.nodule.looks: is 'A dot. It is bright.'; needed: one sentence"),
    ],
)
def test_what_has_no_effect_or_is_too_much_is_named(tmp_path, extra, looks, told):
    with pytest.raises(UmedError) as caught:
        recipe(tmp_path, extra, looks)
    assert told in str(caught.value)
